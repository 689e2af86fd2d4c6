"""The tasks of a continual-learning run: classes of one data set in turn, or several sets.

All tasks share one network, whose head has `config.task_classes` outputs for each task. A sample's
label says its task: class j of task t is t * task_classes + j, and of the logits only those of its
own task count, in training and test alike (the task-incremental setting).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lance_jax import data, loop, metrics
from lance_jax.config import Config, distinct, names
from lance_jax.folder import folder_pictures
from lance_jax.loader import check_batch
from lance_jax.pictures import Pictures


class Task(NamedTuple):
    """One task's pictures; class j of task t has the label t * task_classes + j."""

    name: str
    train: Pictures
    test: Pictures


def read_tasks(config: Config) -> list[Task]:
    """The tasks in the order in which they are learnt, each with `config.task_classes` classes."""
    sets = list(names(config.datasets))
    splits = {name: _splits(config, name) for name in sets}
    count = config.task_classes
    if len(sets) > 1:
        for name in sets:
            classes = splits[name]["train"].classes
            if len(classes) != count:
                raise ValueError(
                    f"data set {name!r} has {len(classes)} classes; each of several data sets must "
                    f"have config.task_classes, {count}"
                )
        parts = [(name, name, tuple(splits[name]["train"].classes)) for name in sets]
    else:
        order = class_order(config, splits[sets[0]]["train"].classes)
        groups = [order[t * count : (t + 1) * count] for t in range(config.tasks)]
        parts = [(", ".join(group), sets[0], group) for group in groups]
    tasks = [
        _task(config, t, name, classes, splits[of], of)
        for t, (name, of, classes) in enumerate(parts)
    ]
    for t, task in enumerate(tasks):
        _check_classes(config, t, task)
        check_batch(len(task.train.labels), config.batch_size)
    return tasks


def _check_classes(config: Config, t: int, task: Task) -> None:
    """Each class is there in training and test."""
    for part, split in ((task.train, "train"), (task.test, config.eval_split)):
        for j, name in enumerate(part.classes):
            if not np.any(part.labels == t * config.task_classes + j):
                raise ValueError(
                    f"task {t} ({task.name}) has no pictures of class {name!r} in the {split} "
                    "split; it needs at least one"
                )


def class_order(config: Config, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes as they come in the tasks: `config.classes`, or all of them as numbered.

    Shuffled by `config.class_seed`.
    """
    named = distinct(config, "classes")
    classes = named or classes
    needed = config.tasks * config.task_classes
    if needed > len(classes):
        source = "config.classes" if named else f"data set {config.datasets!r}"
        raise ValueError(
            f"config.tasks = {config.tasks} of config.task_classes = {config.task_classes} are "
            f"{needed} classes, and {source} has {len(classes)}"
        )
    order = np.arange(len(classes))
    if config.class_seed >= 0:
        np.random.default_rng(config.class_seed).shuffle(order)
    return tuple(classes[i] for i in order[:needed])


def _splits(config: Config, name: str) -> dict[str, Pictures]:
    if name == "digits":
        return {split: data.digits(split) for split in data.SPLITS}
    side = config.resolution
    if name != "folder":
        return {s: data.tfds_pictures(name, config.data_dir, s, side) for s in data.SPLITS}
    return folder_pictures(
        config.folder,
        side,
        test_fraction=config.test_fraction,
        seed=config.seed,
        unreadable=config.unreadable,
        track=metrics.track,
    )


def _task(
    config: Config, t: int, name: str, classes: Sequence[str], splits: dict[str, Pictures], of: str
) -> Task:
    train, test = (data.restrict(splits[split], classes, of) for split in data.SPLITS)
    if config.eval_split == "validation":
        chosen = data.validation_split(train.labels, config.validation_fraction, config.seed)
        train, test = (train.take(indices) for indices in chosen)
    # in no order: a test batch is to hold all classes of its task, of whose statistics it may be
    test = test.take(np.random.default_rng(0).permutation(len(test.labels)))
    first = np.int32(t * config.task_classes)
    return Task(name, *(part._replace(labels=part.labels + first) for part in (train, test)))


def joined(tasks: Sequence[Task]) -> Pictures:
    """The training pictures of all tasks."""
    return together([task.train for task in tasks])


def together(parts: Sequence[Pictures]) -> Pictures:
    """All pictures of several parts, which have labels of their own."""
    arrays = [part.images for part in parts if isinstance(part.images, np.ndarray)]
    if arrays:
        images = np.concatenate(arrays)
    else:
        images = [image for part in parts for image in part.images]
    labels = np.concatenate([part.labels for part in parts])
    classes = tuple(name for part in parts for name in part.classes)
    return parts[0]._replace(images=images, labels=labels, classes=classes)


def own_logits(logits: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Of logits (n, tasks * classes) those of each sample's own task, (n, classes)."""
    heads = logits.reshape(len(logits), -1, classes)
    return jnp.take_along_axis(heads, (labels // classes)[:, None, None], 1)[:, 0]


def criterion(classes: int) -> loop.Criterion:
    """Mean cross-entropy over the classes of each sample's own task."""

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return loop.cross_entropy(own_logits(logits, labels, classes), labels % classes)

    return loss
