"""Pictures of every kind come out in the colours that a viewer shows."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from samples import encoded, pictures

from lance_jax.pictures import Pictures, decode

RED, GREEN, BLUE, WHITE, BLACK = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]], np.uint8
)
SIDE = 16
QUARTERS = np.kron(
    np.array([[RED, GREEN], [BLUE, WHITE]]), np.ones((SIDE // 2, SIDE // 2, 1), np.uint8)
)


def colours(file, side=SIDE):
    """Decoded, in 0 to 255."""
    decoded = decode(file, side)
    assert decoded.shape == (side, side, 3) and decoded.dtype == np.float32
    return (decoded + 1) * 127.5


def test_rgb_jpegs_are_only_resized():
    """Bit for bit: cached features and committed figures depend on it."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 52, 3), np.uint8)
    file = encoded(pixels, "JPEG", quality=90)
    with Image.open(io.BytesIO(file)) as image:
        resized = image.convert("RGB").resize((20, 20), Image.Resampling.BICUBIC)
    expected = np.asarray(resized, np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(decode(file, 20), expected)


def test_pictures_are_scaled_to_minus_one_to_one():
    chosen, pixels = pictures()
    x = chosen.read([3, 1])
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, pixels[[3, 1]] / 127.5 - 1, atol=1e-7)


SHOWN = {  # orientation in EXIF -> what is shown of what is stored
    1: lambda s: s,
    2: lambda s: s[:, ::-1],
    3: lambda s: s[::-1, ::-1],
    4: lambda s: s[::-1],
    5: lambda s: s.swapaxes(0, 1),
    6: lambda s: np.rot90(s, -1),
    7: lambda s: s[::-1, ::-1].swapaxes(0, 1),
    8: lambda s: np.rot90(s),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    file = encoded(QUARTERS, form, exif=exif, **options.get(form, {}))
    np.testing.assert_allclose(colours(file), SHOWN[orientation](QUARTERS), atol=2)


def test_exif_turns_before_the_resize():
    """A tall picture that is stored as a wide one."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = encoded(np.ascontiguousarray(np.rot90(pixels, -1)))
    np.testing.assert_array_equal(decode(encoded(pixels, exif=exif), 8), decode(shown, 8))


def paletted():
    image = Image.new("P", (SIDE, SIDE))
    image.putpalette([*RED, *GREEN, *BLUE, *WHITE])
    indices = np.kron([[0, 1], [2, 3]], np.ones((SIDE // 2, SIDE // 2), int))
    image.putdata(indices.ravel().tolist())
    return image


def transparent(quarters, alpha):
    """`quarters` with the opacity of each quarter."""
    opacity = np.kron(np.array(alpha), np.ones((SIDE // 2, SIDE // 2))).astype(np.uint8)
    return np.concatenate([quarters, opacity[..., None]], axis=-1)


def quarters(*four):
    grid = np.array(four, np.uint8).reshape(2, 2, -1)
    return np.kron(grid, np.ones((SIDE // 2, SIDE // 2, 1), np.uint8))


GREY = quarters(0, 100, 200, 255)
GREY_SHOWN = np.repeat(GREY, 3, axis=-1)
DEEP = (GREY[..., 0].astype(np.uint16) * 257).astype("<u2")
CMYK = quarters([255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255])
CMYK_SHOWN = quarters([0, 255, 255], [255, 0, 255], [255, 255, 0], BLACK)
SEEN_THROUGH = quarters(RED, (127, 255, 127), WHITE, WHITE)  # over white
KINDS = {
    "grey": (encoded(GREY[..., 0]), GREY_SHOWN),
    "grey JPEG": (encoded(GREY[..., 0], "JPEG", quality=100), GREY_SHOWN),
    "1 bit": (encoded(Image.fromarray(GREY[..., 0] > 150)), quarters(BLACK, BLACK, WHITE, WHITE)),
    "palette": (encoded(paletted()), QUARTERS),
    "palette GIF": (encoded(paletted(), "GIF"), QUARTERS),
    "palette, one colour clear": (
        encoded(paletted(), transparency=2),
        quarters(RED, GREEN, WHITE, WHITE),
    ),
    "palette, GIF, one colour clear": (
        encoded(paletted(), "GIF", transparency=0),
        quarters(WHITE, GREEN, BLUE, WHITE),
    ),
    "palette, opacities": (encoded(paletted(), transparency=bytes([255, 128, 0])), SEEN_THROUGH),
    "RGBA": (encoded(transparent(QUARTERS, [[255, 128], [0, 255]])), SEEN_THROUGH),
    "RGB, one colour clear": (
        encoded(QUARTERS, transparency=(0, 0, 255)),
        quarters(RED, GREEN, WHITE, WHITE),
    ),
    "grey, one shade clear": (
        encoded(GREY[..., 0], transparency=0),
        np.repeat(quarters(255, 100, 200, 255), 3, axis=-1),
    ),
    "LA": (
        encoded(Image.fromarray(transparent(GREY, [[255, 128], [0, 255]]))),
        np.repeat(quarters(0, 177, 255, 255), 3, axis=-1),
    ),
    "CMYK JPEG": (
        encoded(Image.frombytes("CMYK", (SIDE, SIDE), CMYK.tobytes()), "JPEG", quality=100),
        CMYK_SHOWN,
    ),
    "CMYK TIFF": (
        encoded(Image.frombytes("CMYK", (SIDE, SIDE), CMYK.tobytes()), "TIFF"),
        CMYK_SHOWN,
    ),
    "16-bit PNG": (encoded(DEEP), GREY_SHOWN),
    "16-bit TIFF": (encoded(DEEP, "TIFF"), GREY_SHOWN),
    "16-bit TIFF, other byte order": (
        encoded(Image.frombytes("I;16B", (SIDE, SIDE), DEEP.astype(">u2").tobytes()), "TIFF"),
        GREY_SHOWN,
    ),
    "16-bit PGM": (b"P5 16 16 65535\n" + DEEP.astype(">u2").tobytes(), GREY_SHOWN),
    "16-bit numbers in 32": (encoded(DEEP.astype(np.int32), "TIFF"), GREY_SHOWN),
    "two frames": (
        encoded(
            Image.fromarray(QUARTERS),
            "TIFF",
            save_all=True,
            append_images=[Image.fromarray(GREY[..., 0])],
        ),
        QUARTERS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_colours_of_every_kind(kind):
    file, shown = KINDS[kind]
    np.testing.assert_allclose(colours(file), shown, atol=2 if "JPEG" in kind else 1)


def test_16_bit_shades_are_kept_apart():
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    np.testing.assert_allclose(colours(encoded(shades))[..., 1], shades / 257, atol=1e-3)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"no picture", r"picture of 10 bytes cannot be read: no picture that Pillow knows"),
        (encoded(QUARTERS)[:60], "cannot be read: .*truncated"),
        (encoded(np.zeros((3, 3), np.float32), "TIFF"), "its numbers are floating"),
        (encoded(np.full((3, 3), 1 << 20, np.int32), "TIFF"), "from 1048576 to 1048576, beyond 16"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, file, message):
    with pytest.raises(ValueError, match=message):
        decode(file, 8)
    path = tmp_path / "it.png"
    path.write_bytes(file)
    with pytest.raises(ValueError, match=r"picture '.*it.png' cannot be read") as error:
        Pictures([path], np.zeros(1, np.int32), ("a",), 8).read([0])
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told_once(tmp_path):
    """Its name is that of Pillow's words for what it does not know."""
    path = tmp_path / "cannot identify.png"
    message = re.escape(f"picture {str(path)!r} cannot be read: No such file or directory")
    with pytest.raises(ValueError, match=f"^{message}$"):
        decode(path, 8)


def in_memory(chosen, _):
    return chosen


def on_disk(chosen, folder):
    paths = [folder / f"{i}.png" for i in range(len(chosen.labels))]
    for path, file in zip(paths, chosen.images, strict=True):
        path.write_bytes(file)
    return chosen._replace(images=paths)


def as_array(chosen, _):
    return chosen._replace(images=chosen.read(range(len(chosen.labels))))


@pytest.mark.parametrize("form", [in_memory, on_disk, as_array])
def test_views_are_mirrored_left_to_right(tmp_path, form):
    chosen, pixels = pictures(flip=True)
    x = pixels / 127.5 - 1
    read = form(chosen, tmp_path).read
    assert chosen.views == 2 and chosen._replace(flip=False).views == 1
    np.testing.assert_allclose(read([3, 1]), x[[3, 1]], atol=1e-6)
    np.testing.assert_allclose(read([3, 1], 1), x[[3, 1], :, ::-1], atol=1e-6)
    mixed = read(np.array([3, 1, 3]), np.array([0, 1, 1]))
    expected = np.stack([x[3], x[1, :, ::-1], x[3, :, ::-1]])
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    np.testing.assert_allclose(read([3, 1]), x[[3, 1]], atol=1e-6)


def test_fingerprint_is_that_of_content_order_and_size(tmp_path):
    chosen, _ = pictures()
    fingerprint = chosen.fingerprint()
    assert on_disk(chosen, tmp_path).fingerprint() == fingerprint
    for other in (
        pictures(seed=1)[0],
        chosen.take(np.array([1, 0, 2, 3, 4])),
        chosen._replace(side=8),
    ):
        assert other.fingerprint() != fingerprint
