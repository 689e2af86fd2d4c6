"""The settings of a run of continual learning, with their defaults, and what they must be."""

import math
from pathlib import Path

import ml_collections

from lance_jax import config as settings
from lance_jax.config import Config

METHODS = (
    ("finetune", "joint", "gpm", "gpm_int4", "sgp", "lance", "lance_scaled", "lance_authors")
    + ("ewc", "er", "lora_per_task", "lora_shared", "lora_dynamic")
)  # fmt: skip
SMALLEST = {"alexnet": 19, "resnet18_narrow": 9}  # pixels of a picture, for one in the last layer
MODELS = (*SMALLEST, "digits")
BATCH_NORM = ("task", "batch", "frozen")


def base() -> ml_collections.ConfigDict:
    """All fields but those of pictures and their network."""
    config = ml_collections.ConfigDict()
    config.method = "lance"  # one or more of METHODS
    config.seed = 0

    # The tasks: `tasks` times `task_classes` classes of one data set, or several data sets of
    # `task_classes` classes each, a task each.
    config.datasets = ""
    config.tasks = 10
    config.task_classes = 10
    config.classes = ""  # names, in the order in which one data set's are learnt; "": as numbered
    config.class_seed = -1  # shuffles them; -1: not at all
    config.eval_split = "test"  # or "validation", held out of the training pictures
    config.validation_fraction = 0.2

    # What batch norm uses in evaluation. "task": the statistics of each task's training pictures,
    # stored for each task; "batch": those of the test batch itself, as in the published
    # experiments. It hides what becomes of one picture at a time, and most of what is forgotten
    # (`finetune_batch` beside `finetune` in docs/continual.md). "frozen": those of the first task,
    # which later tasks train with, too.
    config.bn_eval = "task"
    config.test_batch = 64  # a last batch is filled up from the beginning

    # Training: SGD, a cosine schedule for each task.
    config.epochs = 10
    config.batch_size = 64
    config.learning_rate = ml_collections.ConfigDict(dict.fromkeys(METHODS, 0.1))
    config.momentum = 0.0
    config.clip = 10.0  # global norm of the gradient

    # Projection: what is protected after task t (from 0) is `threshold` + t * `threshold_step` of
    # the energy of each layer's input over its training pictures.
    config.threshold = 0.97
    config.threshold_step = 0.003
    config.scale = 10.0  # alpha of sgp and lance_scaled
    # LANCE: the share of the residual's energy that a task may use (docs/continual.md has others),
    # and what is kept: the inputs of the "layers", or of the "blocks", which are then recomputed.
    config.energy = 0.8
    config.authors_energy = 0.98  # of lance_authors, which counts what is protected in it
    config.keep = "layers"
    # "bfloat16", "int8", or "" for the activation's own; "int4_stochastic", "int8_stochastic"
    config.core_dtype = "int4"
    # The rivals' own.
    config.ewc_strength = 10.0  # chosen of 10, 100 and 1000 by trial on Split CIFAR-100
    config.er_pictures = 100  # of each task at most, as many of each class, in 8 bits a value
    config.lora_rank = 8
    config.lora_energy = 0.9  # of the weight's change in one epoch, for the rank of lora_dynamic

    # A line of metrics every `log_every` steps and at an epoch's end: a window.
    config.log_every = 10
    config.checkpoint_every = 2  # windows
    return config


def digits() -> ml_collections.ConfigDict:
    """`base`, for scikit-learn's digits and their network, two classes at a time."""
    config = base()
    config.datasets = "digits"
    config.model = "digits"
    config.tasks = 5
    config.task_classes = 2
    return config


def continual() -> ml_collections.ConfigDict:
    """`base`, for data sets of TensorFlow Datasets or a folder of class folders."""
    config = base()
    config.datasets = ""  # names, or "folder"
    config.data_dir = settings.DATA_DIR
    config.folder = ""  # of class folders, for "folder"
    config.test_fraction = 0.2  # of it, drawn by the seed, where it has no train/ and test/
    config.unreadable = "error"  # or "skip": files that are no pictures inside are left out
    config.model = "alexnet"  # or "resnet18_narrow", which above 32 pixels has a stem of stride 2
    config.width = 64  # channels of the first layer; the others go with it
    config.resolution = 32  # height and width of the pictures in pixels
    return config


def check(config: Config, workdir: str | Path) -> None:
    """ValueError for a setting or a working directory that cannot be; reads no data."""
    of_digits = config.get("model") == "digits"
    settings.check_fields(config, digits if of_digits else continual)
    methods = settings.check_methods(config, METHODS)
    settings.check_choices("model", [config.model], MODELS)
    settings.check_choices("bn_eval", [config.bn_eval], BATCH_NORM)
    settings.check_choices("eval_split", [config.eval_split], settings.EVAL_SPLITS)
    settings.check_choices("keep", [config.keep], settings.KEEP)
    settings.check_choices("core_dtype", [config.core_dtype], settings.KEPT_AS)
    sets = settings.distinct(config, "datasets")
    if not sets:
        raise ValueError("config.datasets is empty; name the data set, or several")
    if len(sets) > 1 and config.tasks != len(sets):
        raise ValueError(
            f"config.tasks is {config.tasks}; each of several data sets is a task, so it must be "
            f"{len(sets)}"
        )
    if len(sets) > 1 and config.classes:
        raise ValueError(
            f"config.classes is {config.classes!r}, but of several data sets each has its own"
        )
    if (config.model == "digits") != (sets == ("digits",)) or ("digits" in sets and len(sets) > 1):
        raise ValueError(
            f"config.model is {config.model!r} and config.datasets is {config.datasets!r}; the "
            "digits have a network of their own, and it takes no other pictures"
        )
    counts = ("epochs", "batch_size", "test_batch", "log_every", "checkpoint_every")
    counts += ("tasks", "er_pictures", "lora_rank")
    least = dict.fromkeys(counts, 1) | {"task_classes": 2, "class_seed": -1}
    if config.model == "alexnet":  # of one picture, the norms of its dense layers make zeros
        least["batch_size"] = 2
        if config.bn_eval == "batch":
            least["test_batch"] = 2
    settings.check_least(config, least)
    settings.check_share(config, "validation_fraction")
    if not of_digits:
        settings.check_least(config, {"width": 1, "resolution": SMALLEST[config.model]})
        settings.check_choices("unreadable", [config.unreadable], settings.UNREADABLE)
        settings.check_share(config, "test_fraction")
    for field in ("threshold", "authors_energy", "lora_energy"):
        settings.check_energy(config, field)
    _check_threshold(config)
    if config.er_pictures < config.task_classes and "er" in methods:
        raise ValueError(
            f"config.er_pictures is {config.er_pictures}; it must be at least "
            f"config.task_classes, {config.task_classes}, one of each class"
        )
    rates = [f"learning_rate.{method}" for method in methods]
    settings.check_positive(config, ["clip", "scale", "ewc_strength", *rates])
    settings.check_common(config, workdir)


def threshold(config: Config, task: int) -> float:
    """The share of energy that is protected after a task (from 0)."""
    return config.threshold + config.threshold_step * task


def _check_threshold(config: Config) -> None:
    """It does not fall, and is a share after the last task too."""
    step = config.threshold_step
    if not 0 <= step < 1:
        raise ValueError(f"config.threshold_step is {step}; it must lie in [0, 1)")
    last = threshold(config, config.tasks - 1)
    if last > 1:
        most = math.floor((1 - config.threshold) / (config.tasks - 1) * 1e6) / 1e6
        raise ValueError(
            f"config.threshold_step is {step}: from config.threshold, {config.threshold}, it comes "
            f"to {last:.6g} after {config.tasks} tasks, and a share is at most 1; {most} would do"
        )
