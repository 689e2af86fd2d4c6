"""Pretrained weights: safetensors files, local or from the Hugging Face hub, read and written."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from lance_jax.models import mcunet, network
from lance_jax.models.alexnet import AlexNet
from lance_jax.models.deit import DeiT
from lance_jax.models.digits import DigitsNet
from lance_jax.models.mcunet import MCUNet
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.network import Network
from lance_jax.models.resnet import ResNet

# What weights that do not describe their network may be of, by the names of timm.
MODELS: dict[str, Network] = {
    "resnet18": ResNet(),
    "resnet34": ResNet(stages=(3, 4, 6, 3)),
    "resnet18_narrow": ResNet(width=20, small=True, resolution=32),
    "mobilenetv2_100": MobileNetV2(),
    "deit_tiny_patch16_224": DeiT(),
    "alexnet": AlexNet(),
}
KINDS: dict[str, type[Network]] = {
    "mcunet": MCUNet,
    "resnet": ResNet,
    "mobilenetv2": MobileNetV2,
    "deit": DeiT,
    "alexnet": AlexNet,
    "digits": DigitsNet,
}
FILE = "model.safetensors"  # of a repository on the hub, and of a finished run
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".pkl")
_PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save's zip, and a pickle itself
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_SHOWN = 5  # names of each kind in a message


def load(weights: str | Path, model: str = "", resolution: int = 0) -> tuple[Network, Any]:
    """(network, its variables in float32) of a safetensors file.

    The network has the file's classifier as its head; ``network.classes`` is None where the file
    has none.

    Args:
      weights: a file, or a repository of the hub such as "timm/resnet18.tv_in1k": it is looked for
        in the local cache first, then fetched.
      model: a name in `MODELS`; "" where the file has an `architecture` in its metadata, or the
        repository has a model's name.
      resolution: of the pictures in pixels; 0 for what the network was trained at.

    Raises:
      ValueError: for what is no such file, or does not fit the network.
    """
    path = _find(str(weights))
    metadata, tensors = _read(path)
    found = _network(str(weights), metadata, model)
    if resolution:
        found = _resized(found, resolution)
    head = tensors.get(f"{_reference(found, 'head')}.weight")
    if head is not None and head.size and head.ndim:
        found = found.clone(classes=head.shape[0])
    try:
        return found, _variables(found, tensors, path)
    except ValueError as error:
        if not resolution:
            raise
        raise ValueError(
            f"{error} (at config.resolution={resolution}; 0 stands for that of the weights)"
        ) from None


def save(path: str | Path, model: Network, variables: Any, classes: Sequence[str] = ()) -> None:
    """Writes float32 safetensors under the names of the published weights, for `load`.

    `model` is a whole network, from start to end; what it is goes into the metadata, and so do the
    names of its classes where they are given. OSError where the file cannot be written.
    """
    flat = flatten_dict(jax.device_get(variables), sep="/")
    tensors = {
        name: np.ascontiguousarray(_to_reference(model, linen, np.asarray(flat[linen], np.float32)))
        for name, linen in keys(model).items()
    }
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    metadata = {"architecture": json.dumps(describe(model))}
    if classes:
        metadata["classes"] = json.dumps(list(classes))
    unfinished.write_bytes(serialize(tensors, metadata))
    os.replace(unfinished, path)


def classes(path: str | Path) -> tuple[str, ...]:
    """The names of the classes that a file was saved with; () where it has none."""
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("classes", "[]")
    try:
        return tuple(map(str, json.loads(text)))
    except (ValueError, TypeError):
        raise ValueError(
            f"weights file {str(path)!r} has no list of names as its metadata's `classes`"
        ) from None


def keys(model: Network) -> dict[str, str]:
    """Name of each tensor in a file -> path of the variable, "params/blocks_0/conv1/kernel"."""
    modules = {ours: theirs for theirs, ours in model.names().items()}
    found = {}
    for path in flatten_dict(network.shapes(model), sep="/"):
        _, *module, leaf = path.split("/")
        name = f"{modules['/'.join(module)]}.{_LEAVES[leaf]}" if module else leaf
        found[name] = path
    return found


def describe(model: Network) -> dict[str, Any]:
    """The `architecture` of a file's metadata: the kind of the network and its attributes."""
    kind = next(kind for kind, cls in KINDS.items() if type(model) is cls)
    given_by_use = {field.name for field in dataclasses.fields(Network)} - {"resolution"}
    fields = {
        field.name: _plain(getattr(model, field.name))
        for field in dataclasses.fields(model)
        if field.name not in given_by_use
    }
    return {"kind": kind, **fields}


def _plain(value: Any) -> Any:
    """Named tuples as dicts, since JSON would drop their names."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _find(weights: str) -> Path:
    """The local file."""
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", weights)
    if is_id and not weights.endswith(_FILE_SUFFIXES):
        return _from_hub(weights)
    raise ValueError(f"weights file {weights!r} does not exist; give --config.weights=FILE")


def _from_hub(repository: str) -> Path:
    import huggingface_hub as hub  # slow to import, and not needed for local files
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub.logging.set_verbosity_error()  # it tells of every attempt
    try:
        return Path(hub.hf_hub_download(repository, FILE, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(hub.hf_hub_download(repository, FILE))
    except Exception as error:
        # The hub's own errors, its HTTP client's, the proxy's and the disk's have no common class,
        # and the answer to all is the same.
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ValueError(
            f"weights {repository!r} are neither in the cache of huggingface_hub nor to be had "
            f"from the hub ({reason[0]}); give --config.weights=FILE, a safetensors file"
        ) from None


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    """(metadata, tensors by name)."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in [*file.keys()] if not name.endswith("num_batches_tracked")]
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(4).startswith(_PICKLES):
                raise ValueError(
                    f"weights file {str(path)!r} is a pickle: to open one is to run whatever code "
                    "it holds. Give a safetensors file, such as safetensors.torch.save_file writes"
                ) from None
        raise ValueError(
            f"weights file {str(path)!r} is not a safetensors file ({error})"
        ) from None
    except AttributeError as error:  # safetensors asks NumPy for the tensors' type by its name
        raise ValueError(
            f"weights file {str(path)!r} holds numbers that NumPy has not ({error}); give float32"
        ) from None


def _network(weights: str, metadata: Mapping[str, str], model: str) -> Network:
    """The network that the file describes, or else the named one."""
    if "architecture" in metadata:
        found = _parse(metadata["architecture"], weights)
        if model and type(found) is not type(MODELS.get(model)):
            raise ValueError(
                f"weights {weights!r} are those of a {type(found).__name__}, and config.model is "
                f"{model!r}; leave it empty"
            )
        return found
    name = model or weights.split("/")[-1].split(".")[0]  # such as timm/resnet18.tv_in1k
    if name not in MODELS:
        raise ValueError(
            f"weights {weights!r} do not say what network they are of (`architecture` in their "
            f"metadata); give --config.model, one of {', '.join(MODELS)}"
        )
    return MODELS[name]


def _resized(model: Network, resolution: int) -> Network:
    """The network for pictures of another size."""
    resized = model.clone(resolution=resolution)
    try:
        _build(resized)
    except Exception as error:
        # As in `_parse`: a size that does not suit a layer fails wherever it comes to be computed.
        raise ValueError(
            f"config.resolution is {resolution}, which suits no {type(model).__name__} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); 0 stands for "
            f"{model.resolution}, that of the weights"
        ) from None
    return resized


def _build(model: Network) -> None:
    """Raises some error where the shapes of the network, its head included, do not fit together."""
    if model.resolution < 1:
        raise ValueError("a resolution below 1")
    network.shapes(model.clone(classes=1))


def _parse(architecture: str, weights: str) -> Network:
    """The inverse of `describe`, the kind being MCUNet's where there is none."""
    try:
        spec = json.loads(architecture)
        kind = spec.pop("kind", "mcunet")
        if kind == "mcunet":
            found = mcunet.parse(spec)
        else:
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()
            }
            found = KINDS[kind](**values)
        _build(found)
        return found
    except Exception as error:
        # The network is built and traced with whatever numbers and names the file holds: Python,
        # Flax and JAX each raise errors of their own where these do not fit together.
        raise ValueError(
            f"weights {weights!r} describe no network in their metadata (`architecture`: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error


def _reference(model: Network, module: str) -> str:
    return next(theirs for theirs, ours in model.names().items() if ours == module)


def _variables(model: Network, tensors: Mapping[str, np.ndarray], path: Path) -> Any:
    """The variables, each from the tensor of its name."""
    expected: dict[str, Any] = flatten_dict(network.shapes(model), sep="/")
    paths = keys(model)
    head = f"{_reference(model, 'head')}."
    unused = () if model.classes else [name for name in tensors if name.startswith(head)]
    flat, misshapen, infinite = {}, [], []
    for name in paths.keys() & tensors.keys():
        shape = _to_reference(model, paths[name], np.empty(expected[paths[name]].shape)).shape
        tensor, linen = tensors[name], paths[name]
        if tensor.shape != shape or not jax.numpy.issubdtype(tensor.dtype, np.floating):
            misshapen.append(f"{name} ({tensor.dtype}{list(tensor.shape)}, not {list(shape)})")
        elif not np.isfinite(tensor.astype(np.float32)).all():
            infinite.append(name)
        else:
            flat[linen] = _to_linen(tensor, linen).reshape(expected[linen].shape)
    wrong = {
        "missing": paths.keys() - tensors.keys(),
        "extra": tensors.keys() - paths.keys() - set(unused),
        "misshapen": misshapen,
        "not finite": infinite,
    }
    if any(wrong.values()):
        told = [f"{kind}: {_shortened(sorted(names))}" for kind, names in wrong.items() if names]
        raise ValueError(
            f"weights file {str(path)!r} does not fit a {type(model).__name__}; {'; '.join(told)}"
        )
    return unflatten_dict(flat, sep="/")


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _to_linen(tensor: np.ndarray, path: str) -> np.ndarray:
    """(out, in, height, width) -> (height, width, in, out), (out, in) -> (in, out), in float32.

    A depthwise (C, 1, k, k) becomes (k, k, 1, C).
    """
    tensor = np.asarray(tensor, np.float32)
    if path.endswith("/kernel"):
        tensor = np.moveaxis(tensor, (0, 1), (-1, -2))
    return np.ascontiguousarray(tensor)


def _to_reference(model: Network, path: str, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `_to_linen`."""
    if path.endswith("/kernel"):
        tensor = np.moveaxis(tensor, (-1, -2), (0, 1))
    if isinstance(model, MCUNet) and model.epsilon is None and path == "params/head/kernel":
        return tensor[:, :, None, None]  # in these files the classifier is a 1x1 convolution
    return tensor
