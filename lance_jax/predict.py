"""python -m lance_jax.predict --workdir DIR [--method METHOD] [--json] [--export FILE] [IMAGE ...]

Classifies pictures with a network that lance_jax.main has trained, and exports it. It needs neither
the weights that the training began with nor the data. Pictures of any kind are read as in training;
those for the digits' network, which are grey, show a bright digit on dark ground.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lance_jax import devices
from lance_jax.config import METHODS
from lance_jax.loader import read_ahead
from lance_jax.loop import for_device
from lance_jax.models import weights
from lance_jax.models.network import Network, apply_fn, as_params
from lance_jax.pictures import decode

BATCH = 32  # pictures at a time
SHOWN = 3  # classes of a picture
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue: ITU-R BT.601


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="picture files")
    parser.add_argument("--workdir", required=True, help="of the training, or a method's in it")
    parser.add_argument("--method", default="", help="[the one of the best accuracy]")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--export", metavar="FILE", help="a safetensors file to write")
    given = parser.parse_intermixed_args(arguments)
    if not given.images and not given.export:
        parser.error("give pictures, or --export FILE")
    try:
        path, choice = trained_model(Path(given.workdir).expanduser(), given.method)
        network, variables, classes = load(path)
        print(f"model: {path}{choice}", file=sys.stderr)
        if given.export:
            export(path, Path(given.export).expanduser())
        found = predict(network, variables, given.images)
        all_read = show(given.images, classes, found, as_json=given.json)
    except BrokenPipeError:  # whoever read the lines wants no more, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(_one_line(error))
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
    if not all_read:
        sys.exit(1)


def trained_model(workdir: Path, method: str = "") -> tuple[Path, str]:
    """A trained model's file, and words on how it was chosen, "" where there was no choice.

    Without a `method` it is that in `workdir` itself, or else that of its method with the best
    accuracy; of equals the first in the order of METHODS. ValueError where there is none.
    """
    if not workdir.is_dir():
        raise ValueError(f"--workdir {str(workdir)!r} is no folder; give that of a training run")
    if not method and (workdir / weights.FILE).is_file():
        return workdir / weights.FILE, ""
    files = {name: workdir / name / weights.FILE for name in METHODS}
    files = {name: path for name, path in files.items() if path.is_file()}
    if not files and any(workdir.glob("**/tasks/*/_CHECKPOINT_METADATA")):
        raise ValueError(
            f"--workdir {str(workdir)!r} is that of continual learning, whose network has a head "
            "for each task; this command does not know which to use"
        )
    if not files:
        raise ValueError(
            f"--workdir {str(workdir)!r} holds no trained model (METHOD/{weights.FILE}); it is "
            "written at the end of a training run, and by the same command again if it is missing"
        )
    if method:
        if method not in files:
            raise ValueError(
                f"--method is {method!r}, and --workdir {str(workdir)!r} holds trained models of "
                f"{', '.join(files)}"
            )
        return files[method], ""
    if len(files) == 1:
        return next(iter(files.values())), ""
    measured = {name: _accuracy(path.with_name("result.json")) for name, path in files.items()}
    best = max(measured, key=lambda name: measured[name][0])
    accuracy, split = measured[best]
    return files[best], f" ({split} accuracy {accuracy:.1%}, the best of {', '.join(files)})"


def _accuracy(result: Path) -> tuple[float, str]:
    """The accuracy of a finished run, and the split that it was measured on."""
    try:
        found = json.loads(result.read_text())
        split = found["config"]["eval_split"]
        return float(found[f"{split}_accuracy"]), split
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{str(result)!r} does not say how good its method is; choose one by --method"
        ) from None


def load(path: Path) -> tuple[Network, Any, tuple[str, ...]]:
    """(network, its variables, the names of its classes) of a trained model's file."""
    try:
        network, variables = weights.load(path)
        classes = weights.classes(path)
    except ValueError as error:
        raise ValueError(
            f"{error}. Remove it, and the command of the training writes it again"
        ) from error
    if not classes or len(classes) != network.classes:
        raise ValueError(
            f"{str(path)!r} names {len(classes)} classes, and its network has {network.classes}; "
            "it is not the model of a training run"
        )
    return network, variables, classes


def export(model: Path, target: Path) -> None:
    """Copies the file `model` to `target`, which is there complete or not at all."""
    if target.exists() and not target.is_file():  # a folder, or a device to be replaced by a file
        raise ValueError(f"--export {str(target)!r} exists, and is no file")
    if not target.parent.is_dir():
        raise ValueError(f"--export {str(target)!r} lies in no folder that exists")
    try:
        # a folder, since no name in it can be that of another file; and a file has usual rights
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            os.replace(shutil.copyfile(model, Path(folder, "unfinished")), target)
    except OSError as error:
        raise ValueError(f"cannot write --export {str(target)!r}: {error.strerror}") from None


def predict(
    network: Network, variables: Any, images: Sequence[str | Path]
) -> Iterator[np.ndarray | ValueError]:
    """For each picture file its probabilities (classes,) in float32, or why it cannot be read.

    The pictures are read ahead of the network, and at most two batches of them are held.
    """
    size = max(1, min(len(images), BATCH))
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    logits = for_device(apply_fn(network))
    forward = jax.jit(lambda params, x: jax.nn.softmax(logits(params, x)))
    mesh = devices.mesh_for(size)
    params = devices.replicate(as_params(variables), mesh)
    for pictures in read_ahead(lambda batch: _read(batch, network.picture), batches):
        x = np.zeros((size, *network.picture), np.float32)  # always full: no second compile
        for place, picture in enumerate(pictures):
            if not isinstance(picture, ValueError):
                x[place] = picture
        probabilities = np.asarray(forward(params, devices.spread(x, mesh)))
        for picture, row in zip(pictures, probabilities, strict=False):
            yield picture if isinstance(picture, ValueError) else row


def _read(
    images: Sequence[str | Path], shape: tuple[int, int, int]
) -> list[np.ndarray | ValueError]:
    """Pictures (height, width, channels), or why they cannot be read."""

    def read(image: str | Path) -> np.ndarray | ValueError:
        try:
            rgb = decode(Path(image), shape[0])
        except ValueError as error:
            return error
        return rgb if shape[2] == 3 else (rgb @ LUMA)[..., None]

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        return list(threads.map(read, images))


def show(
    images: Sequence[str],
    classes: Sequence[str],
    found: Iterator[np.ndarray | ValueError],
    *,
    as_json: bool,
) -> bool:
    """Prints a line for each picture as it comes; whether all could be read."""
    names, labels = list(map(_printable, images)), list(map(_printable, classes))
    width, class_width = max(map(len, names), default=0), max(map(len, labels))
    all_read = True
    for image, name, row in zip(images, names, found, strict=True):
        if isinstance(row, ValueError):
            print(_one_line(row), file=sys.stderr)
            all_read = False
            continue
        order = np.argsort(-row, kind="stable")
        best = order[0]
        if as_json:
            probabilities = dict(zip(classes, map(float, row), strict=True))
            line = {"file": image, "class": classes[best], "probability": float(row[best])}
            print(json.dumps({**line, "probabilities": probabilities}), flush=True)
        else:
            first = (f"{labels[i]:<{class_width}} {row[i]:6.1%}" for i in order[:SHOWN])
            print(f"{name:<{width}}  {'   '.join(first)}", flush=True)
    return all_read


def _printable(name: str) -> str:
    """A file's or folder's name that is no UTF-8 could not be printed; in JSON it is escaped."""
    return os.fsencode(name).decode(errors="replace")


def _one_line(error: object) -> str:
    return f"error: {' '.join(str(error).split())}"


if __name__ == "__main__":
    devices.use_cores()
    main()
