"""The settings that every run has, with their defaults, and what they must be.

The files in `configs/` state what differs from the defaults.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from lance_jax import metrics
from lance_jax.factors import CORE_DTYPES
from lance_jax.models.network import STATISTICS
from lance_jax.models.weights import MODELS
from lance_jax.pictures import Pictures

Config = Any  # an ml_collections.ConfigDict, whose own annotations fit no field

DATA_DIR = "~/tensorflow_datasets"  # where TensorFlow Datasets looks, too
METHODS = ("head", "bias", "backprop", "lance")
EVAL_SPLITS = ("test", "validation")
UNREADABLE = ("error", "skip")
KEPT_AS = ("", *filter(None, CORE_DTYPES))  # "" for the activation's own dtype
KEEP = ("layers", "blocks")
MODES = ("paper", "none", "batch", "height", "width", "channel", "patch", "token", "feature")
# what may change between two runs in one working directory; anything else changes the results
FREE_FIELDS = ("method", "cache_dir")


def base() -> ml_collections.ConfigDict:
    """All fields but those of a data set and a network."""
    config = ml_collections.ConfigDict()
    config.method = "lance"  # one or more of head,bias,backprop,lance
    config.seed = 0

    # The task. `classes` are names; "" means all of them.
    config.dataset = ""
    config.classes = ""
    config.flip = False  # mirrored pictures as further training examples
    config.eval_split = "test"  # or "validation", held out of the training pictures
    config.validation_fraction = 0.2

    # The network: frozen but for its last layers (not depthwise) and a new head.
    config.model = ""
    config.trainable_layers = 4

    # Training: SGD, cosine schedule. The files in configs/ have learning rates that were chosen on
    # a validation split, or say that theirs were not.
    config.epochs = 15
    config.batch_size = 128
    # Samples that go through the network at a time, at most the batch; 0: on a CPU the fastest of a
    # few, by timing, which may differ from run to run, elsewhere the whole batch.
    config.micro_batch = 0
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.05, "bias": 0.05, "backprop": 0.05, "lance": 0.05}
    )
    config.momentum = 0.9
    config.clip = 2.0  # global norm of the gradient

    # LANCE. `keep`: of the inputs of the trained "layers", or of the "blocks" that they stand in,
    # which are then recomputed. `modes`: "" for the default, "paper", "none" for whole inputs, or
    # names such as "channel,height" (of a transformer "feature,token").
    config.keep = "layers"
    config.calibration_batches = 8
    config.energy = 0.96  # see docs/results.md for what others give
    config.modes = ""
    config.core_dtype = "int4"  # "bfloat16", "int8", or "" for the activation's own

    # A line of metrics every `log_every` steps and at an epoch's end: a window.
    config.log_every = 10
    config.checkpoint_every = 4  # windows
    return config


def digits() -> ml_collections.ConfigDict:
    """`base`, for the small network that is pretrained on some classes of the digits."""
    config = base()
    config.dataset = "digits"
    config.model = "digits"
    config.pretrain = ml_collections.ConfigDict(
        {"classes": "0,1,2,3,4", "epochs": 10, "learning_rate": 0.1}
    )
    return config


def pretrained() -> ml_collections.ConfigDict:
    """`base`, for a network pretrained on ImageNet and a data set of TensorFlow Datasets."""
    config = base()
    config.data_dir = DATA_DIR
    config.flip = True
    # A safetensors file, or a repository of the Hugging Face hub.
    config.weights = "timm/mobilenetv2_100.ra_in1k"
    config.model = ""  # needed where the weights do not say: see lance_jax/models/weights.py
    # Of the pictures, in pixels; 0 for what the network was trained at. At 160 there are half the
    # multiplications of the 224 of most weights.
    config.resolution = 160
    # Found on a validation split of CIFAR-10 with MCUNet: a start for other pictures and networks.
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.0125, "bias": 0.05, "backprop": 0.05, "lance": 0.05}
    )
    config.batch_stats = "frozen"  # or "trained", for networks with batch norm
    config.cache_dir = "~/.cache/lance_jax"  # of frozen features; "" for memory alone
    return config


def folder() -> ml_collections.ConfigDict:
    """`pretrained`, for a folder of class folders."""
    config = pretrained()
    config.dataset = "folder"
    config.folder = ""
    del config.data_dir
    config.batch_size = 32  # own pictures are often few
    config.test_fraction = 0.2  # drawn by the seed, where the folder has no train/ and test/
    config.unreadable = "error"  # or "skip": files that are no pictures inside are left out
    return config


def names(value: str | Sequence[str]) -> tuple[str, ...]:
    """The names in "a,b" or ("a", "b")."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


def distinct(config: Config, field: str) -> tuple[str, ...]:
    """The names in a field; ValueError if one of them stands there twice."""
    found = names(config[field])
    if len(set(found)) < len(found):
        raise ValueError(f"config.{field} is {config[field]!r}, which names one of them twice")
    return found


def check(config: Config, workdir: str | Path) -> None:
    """ValueError for a setting or a working directory that cannot be; reads no data."""
    bases = {"digits": digits} | dict.fromkeys(("", *MODELS), pretrained)
    origin = folder if config.get("dataset") == "folder" else bases.get(config.get("model"), base)
    check_fields(config, origin)
    methods = check_methods(config, METHODS)
    check_choices("model", [config.model], ("", "digits", *MODELS))
    check_choices("batch_stats", [config.get("batch_stats", "frozen")], STATISTICS)
    check_choices("eval_split", [config.eval_split], EVAL_SPLITS)
    check_choices("keep", [config.keep], KEEP)
    check_choices("modes", names(config.modes), ("", *MODES))
    check_choices("core_dtype", [config.core_dtype], KEPT_AS)
    if config.keep == "blocks" and "patch" in names(config.modes):
        raise ValueError(
            f"config.modes is {config.modes!r}, but config.keep is 'blocks': patches are of layers"
        )
    if config.dataset == "folder":
        check_choices("unreadable", [config.unreadable], UNREADABLE)
    if (config.model == "digits") != (config.dataset == "digits"):
        raise ValueError(
            f"config.model is {config.model!r} and config.dataset is {config.dataset!r}; the "
            "digits have a network of their own, and it takes no other pictures"
        )
    counts = ("epochs", "batch_size", "log_every", "checkpoint_every", "calibration_batches")
    check_least(config, dict.fromkeys(counts, 1) | {"micro_batch": 0})
    if config.model == "digits":
        check_least(config, {"pretrain.epochs": 1})
    else:
        check_least(config, {"resolution": 0})
    _check_modes(config)
    _check_micro_batch(config)
    if config.dataset == "folder":
        check_share(config, "test_fraction")
    positive = ["clip", *(f"learning_rate.{method}" for method in methods)]
    if config.model == "digits":
        positive.append("pretrain.learning_rate")
    check_positive(config, positive)
    check_common(config, workdir)
    if config.get("cache_dir"):
        _check_writable(config.cache_dir, "config.cache_dir")


def check_common(config: Config, workdir: str | Path) -> None:
    """The seed, the energy and the momentum, and a working directory for this configuration."""
    check_least(config, {"seed": 0})
    if config.seed >= 2**32:
        raise ValueError(f"config.seed is {config.seed}; it must be below {2**32}")
    check_energy(config, "energy")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"config.momentum is {config.momentum}; it must lie in [0, 1)")
    _check_writable(workdir, "--workdir")
    _compare_claim(Path(workdir), "config", _fixed(config))


def check_methods(config: Config, known: Sequence[str]) -> tuple[str, ...]:
    """The names in `config.method`, one or more of those that are known."""
    methods = distinct(config, "method")
    check_choices("method", methods, known)
    if not methods:
        raise ValueError(f"config.method is empty; give one or more of {','.join(known)}")
    return methods


def check_choices(field: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Each value given is one of those that are known."""
    for value in given:
        if value not in known:
            raise ValueError(
                f"config.{field} is {value!r}; it must be one of {', '.join(map(repr, known))}"
            )


def check_least(config: Config, least: Mapping[str, int]) -> None:
    """Each named field ("a" or "a.b") is at least the number given."""
    for field, bound in least.items():
        value = _at(config, field)
        if value < bound:
            raise ValueError(f"config.{field} is {value}; it must be at least {bound}")


def check_positive(config: Config, fields: Sequence[str]) -> None:
    """Each named field ("a" or "a.b") is positive and finite."""
    for field in fields:
        value = _at(config, field)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"config.{field} is {value!r}; it must be positive and finite")


def check_share(config: Config, field: str) -> None:
    """The field lies between 0 and 1."""
    if not 0 < config[field] < 1:
        raise ValueError(f"config.{field} is {config[field]}; it must lie in (0, 1)")


def check_energy(config: Config, field: str) -> None:
    """The field is a share that is not 0."""
    if not 0 < config[field] <= 1:
        raise ValueError(f"config.{field} is {config[field]}; it must lie in (0, 1]")


def _at(config: Config, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def _check_modes(config: Config) -> None:
    """The modes go together, and with the energy."""
    modes = names(config.modes)
    if {"paper", "none"} & set(modes) and len(modes) > 1:
        raise ValueError(f"config.modes is {config.modes!r}; paper and none stand alone")
    if "patch" in modes and set(modes) - {"patch", "batch"}:
        raise ValueError(f"config.modes is {config.modes!r}; patch goes with batch alone")
    if modes == ("paper",) and config.energy != 0.7:
        raise ValueError(
            f"config.modes=paper stands for config.energy=0.7, and it is {config.energy}; give both"
        )


def _check_micro_batch(config: Config) -> None:
    """Nothing needs the whole batch where micro-batches divide it."""
    size, whole = config.micro_batch, config.batch_size
    if 0 < size < whole and needs_whole_batch(config):
        raise ValueError(
            f"config.micro_batch is {size}, but config.batch_stats=trained and the batch mode "
            f"(config.modes=paper has it) need the whole batch, {whole}"
        )


def needs_whole_batch(config: Config) -> bool:
    """Whether something in the network depends on the batch as a whole."""
    batch_mode = bool({"paper", "batch"} & set(names(config.modes)))
    return config.get("batch_stats") == "trained" or batch_mode


def check_fields(config: Config, origin: Callable[[], Any]) -> None:
    """All fields of the base are there, and numbers where numbers belong."""
    for name, default in origin().items():
        if name not in config:
            raise ValueError(
                f"config.{name} is missing; begin with {origin.__module__}.{origin.__name__}()"
            )
        if isinstance(default, ml_collections.ConfigDict):
            wanted = names(config.method) if name == "learning_rate" else default
            for entry in wanted:
                if entry in default and entry not in config[name]:
                    raise ValueError(f"config.{name} has no entry {entry!r}")
        kinds = {
            int: (int, "an integer"),
            float: ((int, float), "a number"),
            str: ((str, list, tuple, Path), "a string"),
        }
        kind, told = kinds.get(type(default), (object, ""))
        if not isinstance(config[name], kind):
            raise ValueError(f"config.{name} is {config[name]!r}; it must be {told}")


def _check_writable(directory: str | Path, setting: str) -> None:
    path = Path(directory).expanduser()
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:  # what writes the checkpoints knows no other names
        raise ValueError(f"{setting} is {str(path.absolute())!r}, which is not UTF-8") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"cannot write to {setting} {str(directory)!r}: {error.strerror}"
        ) from None


def claim(config: Config, workdir: Path, pictures: Mapping[str, Pictures], params: Any) -> None:
    """Writes WORKDIR/config.json: one working directory, one configuration, the same inputs.

    Not before weights and data are known to be there: a mistyped name must not take the directory.
    """
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    digests = {split: part.fingerprint() for split, part in pictures.items()}
    digests["weights"] = weights.hexdigest()
    _compare_claim(workdir, "contents", digests)
    if not (workdir / "config.json").exists():
        if any(workdir.glob("*/checkpoints")) or any(workdir.glob("*/tasks")):
            raise ValueError(
                f"--workdir {str(workdir)!r} holds a run, but not its config.json; put it back, or "
                "choose another directory"
            )
        held = json.dumps({"config": _fixed(config), "contents": digests}, indent=2)
        metrics.write_atomically(workdir / "config.json", held + "\n")


def _fixed(config: Config) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in FREE_FIELDS}


def _compare_claim(workdir: Path, key: str, values: dict[str, Any]) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        claimed = dict(json.loads(path.read_text())[key])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{str(path)!r} does not say what its directory holds; choose another --workdir"
        ) from None
    for name, value in json.loads(json.dumps(values)).items():
        if claimed.get(name) != value:
            raise ValueError(
                f"--workdir {str(workdir)!r} holds a run with {key}.{name} = "
                f"{claimed.get(name)!r}, not {value!r}; choose another directory"
            )
