"""What the methods share: a network with pretrained weights, and pictures for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from lance_jax import data, devices, metrics
from lance_jax.config import Config, claim, distinct, names
from lance_jax.features import Features, features
from lance_jax.folder import class_root, folder_pictures
from lance_jax.loader import check_batch
from lance_jax.loop import ApplyFn, Examples, fit, for_device, loss_of
from lance_jax.models import weights
from lance_jax.models.digits import DigitsNet
from lance_jax.models.network import Network, apply_fn, as_params, shapes
from lance_jax.origins import as_activation
from lance_jax.pictures import Pictures

PREFIX_BATCH = 32  # pictures at a time through the frozen prefix


class Problem(NamedTuple):
    """What all methods share: logits = apply_fn(params, inputs), and the examples.

    The inputs are the frozen prefix's features, or the pictures where nothing is frozen. `train_fn`
    is what is trained: `apply_fn`, or with trained batch statistics a function to (logits,
    {"batch_stats": the new ones}); `params` holds them too. `network` is that of the whole network,
    from pictures on, with the shapes of its parameters and of one picture. `whole` is that network
    itself, `loaded` its variables before training, with whatever head they came with.
    """

    apply_fn: ApplyFn
    train_fn: ApplyFn
    params: Any
    layers: list[str]  # paths of the trainable layers, such as "blocks_12/conv1"
    train: Examples
    evaluation: Examples
    network: tuple[ApplyFn, Any, tuple[int, ...]]
    whole: Network
    loaded: Any
    classes: tuple[str, ...]


def prepare(config: Config, workdir: str | Path) -> Problem:
    """Reads weights and pictures, and passes the pictures through the frozen prefix."""
    classes = distinct(config, "classes")
    splits = ("train", "test") if config.eval_split == "test" else ("train",)
    if config.dataset == "folder":
        class_root(config.folder)  # before weights are fetched
    if config.model == "digits":
        network, variables, cache_dir = DigitsNet(), {}, ""
    else:
        network, variables = weights.load(config.weights, config.model, config.resolution)
        if network.picture[-1] != 3:
            raise ValueError(
                f"weights {config.weights!r} are those of a {type(network).__name__}, which takes "
                "no coloured pictures"
            )
        cache_dir = config.cache_dir
    if config.get("batch_stats") == "trained" and "batch_stats" not in variables:
        raise ValueError(
            f"config.batch_stats is 'trained', and the network of {config.weights!r} has no "
            "batch norm"
        )
    layers, first_block = trained_layers(network, config.trainable_layers)
    if config.model == "digits":
        pictures = {split: data.digits(split, classes) for split in splits}
        known = data.digits("train", names(config.pretrain.classes))
        check_batch(len(known.labels), config.batch_size)
    else:
        pictures = read_pictures(config, splits, network.resolution)
    check_batch(len(training_indices(config, pictures["train"].labels)[0]), config.batch_size)
    claim(config, Path(workdir), pictures, variables)
    if config.model == "digits":
        variables = {"params": pretrain_digits(config, workdir)}
    n = len(pictures["train"].classes)
    print(
        f"loaded {len(jax.tree.leaves(variables))} tensors of a {type(network).__name__} "
        f"({network.resolution} px) from {config.get('weights', 'its pretraining')}; its head "
        f"('head', {n} classes) is new"
    )
    prefix = network.clone(stop=first_block, classes=None) if first_block else None
    train, evaluation = examples(config, prefix, variables, pictures, cache_dir)
    whole = network.clone(classes=n)
    suffix = whole.clone(start=first_block)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    initial = jax.eval_shape(suffix.init, key, train.read([0]))
    used = {name: _entries(variables[name], initial[name]) for name in initial}
    used["params"]["head"] = jax.jit(lambda *args: suffix.init(*args)["params"]["head"])(
        key, train.read([0])
    )
    trained = {"batch_stats": config.get("batch_stats", "frozen")}
    train_fn = apply_fn(suffix.clone(**trained))
    return Problem(
        apply_fn=apply_fn(suffix),
        train_fn=train_fn if prefix is None else _after(train_fn),
        params=jax.tree.map(jnp.asarray, as_params(used)),
        layers=layers,
        train=train,
        evaluation=evaluation,
        network=(apply_fn(whole.clone(**trained)), as_params(shapes(whole)), whole.picture),
        whole=whole,
        loaded=variables,
        classes=pictures["train"].classes,
    )


def _after(apply: ApplyFn) -> ApplyFn:
    """The same; features count as what a whole network would have to keep, though they are data."""
    return lambda params, x, **rngs: apply(params, as_activation(x), **rngs)


def trained_layers(network: Network, n: int) -> tuple[list[str], int]:
    """Paths of the last `n` layers, such as "blocks_12/conv1", and the first block to be trained.

    That is the number of blocks where all of them lie behind the last one, and 0 where the stem is
    among them.
    """
    whole = network.clone(classes=2)  # what the head is, and how wide, does not matter
    picture = jax.ShapeDtypeStruct((1, *whole.picture), jnp.float32)
    params = as_params(shapes(whole))
    found = lance_jax.layers(apply_fn(whole), params, picture)
    try:
        paths = [layer.path.removesuffix("/kernel") for layer in lance_jax.last(n)(found)]
    except ValueError as error:
        raise ValueError(f"config.trainable_layers is {n}: {error}") from None
    if "stem" in paths:
        return paths, 0
    blocks = [int(path.split("/")[0].removeprefix("blocks_")) for path in paths if "/" in path]
    return paths, min(blocks, default=sum(name.startswith("blocks_") for name in params))


def _entries(tree: Any, names: Any) -> dict[str, Any]:
    """Those entries of `tree` that `names` has too."""
    return {name: tree[name] for name in sorted(names) if name in tree}


def read_pictures(config: Config, splits: Sequence[str], side: int) -> dict[str, Pictures]:
    """The splits of a folder, or of a prepared data set, by name."""
    classes = distinct(config, "classes")
    if config.dataset != "folder":
        place = config.data_dir
        return {s: data.tfds_pictures(config.dataset, place, s, side, classes) for s in splits}
    pictures = folder_pictures(
        config.folder,
        side,
        classes,
        test_fraction=config.test_fraction,
        seed=config.seed,
        unreadable=config.unreadable,
        track=metrics.track,
    )
    return {split: pictures[split] for split in splits}


def examples(
    config: Config,
    prefix: Network | None,
    variables: dict[str, Any],
    pictures: dict[str, Pictures],
    cache_dir: str,
) -> tuple[Examples, Examples]:
    """Training and evaluation examples: the pictures' frozen features, or else the pictures."""
    train = pictures["train"]._replace(flip=config.flip)
    parts = {"train": train, **{name: part for name, part in pictures.items() if name != "train"}}
    if prefix is not None:
        parts = frozen_features(prefix, variables, parts, cache_dir)
    if config.eval_split == "test":
        return parts["train"], parts["test"]
    kept, held_out = training_indices(config, train.labels)
    return parts["train"].take(kept), parts["train"].take(held_out)


def training_indices(config: Config, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training split (trained on, held out for validation)."""
    if config.eval_split == "test":
        return np.arange(len(labels)), np.arange(0)
    return data.validation_split(labels, config.validation_fraction, config.seed)


def frozen_features(
    prefix: Network, variables: dict[str, Any], pictures: dict[str, Pictures], cache_dir: str
) -> dict[str, Features]:
    """Output of the frozen prefix for each split."""
    used = shapes(prefix)
    frozen = {name: _entries(variables[name], used[name]) for name in used}
    forward = jax.jit(for_device(prefix.apply))
    mesh = devices.mesh_for(PREFIX_BATCH)
    copies = devices.replicate(frozen, mesh)

    return {
        split: features(
            lambda images: np.asarray(forward(copies, devices.spread(images, mesh))),
            part,
            weights=[repr(prefix), *map(np.asarray, jax.tree.leaves(frozen))],
            batch_size=PREFIX_BATCH,
            cache_dir=cache_dir,
            track=metrics.track,
        )
        for split, part in pictures.items()
    }


def pretrain_digits(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Parameters of the whole digits network, trained on the classes of `config.pretrain`."""
    classes = names(config.pretrain.classes)
    pictures = data.digits("train", classes)
    network = DigitsNet(classes=len(classes))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    return fit(
        loss_of(apply_fn(network)),
        network.init(key, jnp.asarray(pictures.read([0])))["params"],
        pictures,
        config,
        epochs=config.pretrain.epochs,
        learning_rate=config.pretrain.learning_rate,
        field="pretrain.learning_rate",
        trainable=None,
        calibrate=None,
        directory=Path(workdir) / "pretrain",
        micro_batch=config.batch_size,
    ).params
