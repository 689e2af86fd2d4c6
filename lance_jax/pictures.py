"""Picture files of any kind, decoded to RGB; the pictures of a split, read by all CPU cores."""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

WHITE_16_BIT = 65535


class Pictures(NamedTuple):
    """One split of a data set: picture files or arrays, labels (n,) int32, class names.

    `images` are encoded files (bytes), paths of files that are read each time they are asked for,
    or one array (n, side, side, channels). `side` is the pictures' height and width in pixels once
    read. With `flip` there are two views of each: as it is, and mirrored left to right.
    """

    images: Sequence[bytes] | Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    side: int
    flip: bool = False

    @property
    def views(self) -> int:
        """The number of views of each picture."""
        return 1 + self.flip

    def read(self, indices: Sequence[int] | np.ndarray, views: int | np.ndarray = 0) -> np.ndarray:
        """Pictures (n, side, side, channels) in float32, from -1 to 1, each in its view of `views`.

        ValueError for a file that cannot be read.
        """
        mirrored = np.broadcast_to(views, len(indices)) == 1
        if isinstance(self.images, np.ndarray):
            x = self.images[np.asarray(indices)]
            x[mirrored] = x[mirrored, :, ::-1]
            return x
        x = np.empty((len(indices), self.side, self.side, 3), np.float32)

        def read(place: int) -> None:
            pixels = decode(self.images[indices[place]], self.side)
            x[place] = pixels[:, ::-1] if mirrored[place] else pixels

        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
            list(threads.map(read, range(len(indices))))
        return x

    def take(self, indices: np.ndarray) -> "Pictures":
        """The pictures at `indices`."""
        images = self.images
        chosen = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return self._replace(images=chosen, labels=self.labels[indices])

    def fingerprint(self) -> str:
        """Hash of the pictures in their order, and of how they are read."""
        digest = hashlib.sha256(f"rgb bicubic {self.side} /127.5-1 v2".encode())
        for image in self.images:
            content = image.read_bytes() if isinstance(image, Path) else image
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def decode(image: bytes | Path, side: int) -> np.ndarray:
    """The picture of a file as RGB (side, side, 3) in float32, from -1 to 1.

    It is turned as its EXIF orientation says and resized bicubically, whatever its proportions.
    What is transparent shows white; 16-bit grey is scaled; of an animation the first picture is
    taken; colour profiles are not applied. ValueError where Pillow cannot read it.
    """
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            resized = _to_rgb(picture).resize((side, side), Image.Resampling.BICUBIC)
    except Exception as error:
        # On damaged files Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error,
        # IndexError, its own DecompressionBombError and more, of which it keeps no list.
        # Its own words name a buffer by its address, and the system's the path once more
        unknown = isinstance(error, UnidentifiedImageError)
        told = "no picture that Pillow knows" if unknown else getattr(error, "strerror", None)
        reason = told or str(error) or type(error).__name__
        name = f"of {len(image):,} bytes" if isinstance(image, bytes) else repr(str(image))
        raise ValueError(f"picture {name} cannot be read: {reason}") from error
    return np.asarray(resized, np.float32) / np.float32(127.5) - np.float32(1)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its numbers are floating, of which none is known to be white")
    if picture.mode.startswith("I"):  # converting it would clip at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > WHITE_16_BIT:
            raise ValueError(f"its numbers go from {grey.min()} to {grey.max()}, beyond 16 bits")
        scaled = (grey * 255 + WHITE_16_BIT // 2) // WHITE_16_BIT
        picture = Image.fromarray(scaled.astype(np.uint8))
    elif picture.has_transparency_data:
        above = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return picture.convert("RGB")
