"""Fine-tunes one network by several methods that differ in nothing but what they train and keep."""

import itertools
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from lance_jax import data, devices, metrics
from lance_jax.config import Config, check, claim, names, needs_whole_batch
from lance_jax.features import Features, features
from lance_jax.folder import folder_pictures
from lance_jax.loader import Loader, check_batch, read_ahead
from lance_jax.loop import ApplyFn, Examples, Fitted, fit, for_device, loss_of
from lance_jax.memory import Report, SavedBytes
from lance_jax.models import weights
from lance_jax.models.digits import DigitsNet
from lance_jax.models.network import Network, apply_fn, as_params, as_variables, shapes
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


def compare(config: Config, workdir: str | Path) -> list[dict[str, Any]]:
    """Runs every method of `config.method` under `workdir` and prints the comparison."""
    check(config, workdir)
    problem = prepare(config, workdir)
    results = [run(config, workdir, method, problem) for method in names(config.method)]
    metrics.show_table(results)
    return results


def run(
    config: Config, workdir: str | Path, method: str, problem: Problem | None = None
) -> dict[str, Any]:
    """Trains and evaluates one method; writes and returns WORKDIR/METHOD/result.json.

    Beside it, and written before it, lies the whole trained network, model.safetensors.
    A run that was stopped goes on from its last checkpoint, with the numbers of one that was not.
    `problem` is what `prepare` gives, where several methods share it.
    """
    check(config, workdir)
    problem = prepare(config, workdir) if problem is None else problem
    directory = Path(workdir) / method
    fitted = fit_method(config, problem, method, directory)
    saved, saved_backprop = saved_bytes(config, method, problem, fitted)
    result = {
        "config": config.to_dict(),
        "method": method,
        f"{config.eval_split}_accuracy": accuracy(problem, fitted.params, config.batch_size),
        "loss": fitted.loss,
        "saved_bytes": saved,
        "saved_bytes_backprop": saved_backprop,
        "micro_batch": fitted.micro_batch,
        "step_seconds": metrics.spread(fitted.step_seconds),
        "calibration_seconds": fitted.calibration_seconds if method == "lance" else None,
        "ranks": {path: layer.ranks for path, layer in fitted.factors.items()},
        "versions": versions(),
        "device": device(),
        "seed": config.seed,
    }
    save_model(directory / weights.FILE, problem, fitted.params)
    metrics.write_atomically(directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def fit_method(config: Config, problem: Problem, method: str, directory: Path) -> Fitted:
    """Trains one method in `directory`, or goes on there.

    LANCE is compressed with its factors, head and bias with none, which packs their masks; backprop
    is plain JAX.
    """
    calibrate = {"backprop": None, "lance": calibration(config, problem)}
    return fit(
        problem.train_fn,
        problem.params,
        problem.train,
        config,
        epochs=config.epochs,
        learning_rate=config.learning_rate[method],
        field=f"learning_rate.{method}",
        trainable=trainable_patterns(method, problem.layers),
        calibrate=calibrate.get(method, lance_jax.Factors),
        directory=directory,
        micro_batch=micro_batch(config),
        has_aux=trains_statistics(config),
    )


def micro_batch(config: Config) -> int | None:
    """Samples that go through the network at a time, for `loop.fit`."""
    if needs_whole_batch(config):
        return None
    if jax.default_backend() != "cpu":
        return config.micro_batch or config.batch_size
    return config.micro_batch


def trains_statistics(config: Config) -> bool:
    """Whether batch norm uses and trains the batch's own statistics."""
    return config.get("batch_stats") == "trained"


# The problem


def prepare(config: Config, workdir: str | Path) -> Problem:
    """Reads weights and pictures, and passes the pictures through the frozen prefix."""
    classes = names(config.classes)
    splits = ("train", "test") if config.eval_split == "test" else ("train",)
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
    if trains_statistics(config) and "batch_stats" not in variables:
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
    return Problem(
        apply_fn=apply_fn(suffix),
        train_fn=apply_fn(suffix.clone(**trained)),
        params=jax.tree.map(jnp.asarray, as_params(used)),
        layers=layers,
        train=train,
        evaluation=evaluation,
        network=(apply_fn(whole.clone(**trained)), as_params(shapes(whole)), whole.picture),
        whole=whole,
        loaded=variables,
        classes=pictures["train"].classes,
    )


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
    classes = names(config.classes)
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
        apply_fn(network),
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


# The methods


def trainable_patterns(method: str, layers: Sequence[str]) -> list[str]:
    """Regular expressions of the parameters that a method trains, over paths in `params`."""
    # with batch norm behind it, a layer's bias is that of the norm
    leaves = {"head": [], "bias": ["(_norm)?/bias"]}.get(method, ["(_norm)?/bias", "/kernel"])
    return ["^head/", *(f"^{layer}{leaf}$" for layer in layers for leaf in leaves)]


def calibration(config: Config, problem: Problem) -> Callable[[], lance_jax.Factors]:
    """A function that gives LANCE's factors, from the first training batches, forward only.

    Of the head's input, which is small, only the bits are cut.
    """
    modes = {"": None, "paper": "paper", "none": ()}.get(config.modes, names(config.modes))
    core_dtype = config.core_dtype or None

    def calibrate() -> lance_jax.Factors:
        order = Loader(len(problem.train.labels), config.batch_size, config.seed)
        batches = itertools.islice(order, config.calibration_batches)
        factors = lance_jax.calibrate(
            for_device(problem.train_fn),
            problem.params,
            map(jnp.asarray, read_ahead(problem.train.read, batches)),
            select=[f"^{layer}/" for layer in problem.layers],
            energy=config.energy,
            modes=modes,
            core_dtype=core_dtype,
        )
        head = lance_jax.LayerFactors({}, core_dtype=core_dtype)
        return lance_jax.Factors({**factors, "head/kernel": head}, factors.skipped)

    return calibrate


def saved_bytes(
    config: Config, method: str, problem: Problem, fitted: Fitted
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a step keeps for its backward pass: the method's, and plain backprop's.

    Counted for the whole network, by shapes: with cached features the first trained layer's input
    is an argument, which costs plain backprop nothing. In micro-batches the method keeps what one
    of them needs, and each device's sum of the gradients. Plain backprop's is the fair figure of
    `lance_jax.report`, for all the trainable layers and the whole batch.
    """
    train_fn, params, picture = problem.network
    loss = loss_of(train_fn, trains_statistics(config))

    def report(method: str, size: int) -> Report:
        batch = (
            jax.ShapeDtypeStruct((size, *picture), jnp.float32),
            jax.ShapeDtypeStruct((size,), problem.train.labels.dtype),
        )
        patterns = trainable_patterns(method, problem.layers)
        return lance_jax.report(loss, params, *batch, factors=fitted.factors, trainable=patterns)

    def counts(saved: SavedBytes, extra: int = 0) -> dict[str, int]:
        return {"layer_inputs": int(saved.layer_inputs), "total": int(saved.total + extra)}

    backprop = counts(report("backprop", config.batch_size).saved_bytes_backprop)
    size, sums = fitted.micro_batch, 0
    if size < config.batch_size:
        patterns = trainable_patterns(method, problem.layers)
        trained, _ = lance_jax.value_and_grad(loss, trainable=patterns).partition(params)
        sums = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
        sums *= devices.mesh_for(size, config.batch_size).size
    elif method == "backprop":
        return backprop, backprop
    found = report(method, size)
    saved = found.saved_bytes_backprop if method == "backprop" else found.saved_bytes
    return counts(saved, sums), backprop


def accuracy(problem: Problem, params: Any, batch_size: int) -> float:
    """Share of the evaluation examples, unmirrored, that the network classifies rightly."""
    labels = problem.evaluation.labels
    logits = for_device(problem.apply_fn)
    predict = jax.jit(lambda params, inputs: jnp.argmax(logits(params, inputs), axis=-1))
    n, right = len(labels), 0
    # a full last batch: no second compile
    batches = [np.arange(start, start + batch_size) % n for start in range(0, n, batch_size)]
    inputs = read_ahead(problem.evaluation.read, batches)
    mesh = devices.mesh_for(batch_size)
    params = devices.replicate(params, mesh)
    for start, indices, batch in zip(range(0, n, batch_size), batches, inputs, strict=True):
        predicted = np.asarray(predict(params, devices.spread(batch, mesh)))
        right += int((predicted == labels[indices])[: n - start].sum())
    return right / n


def save_model(path: Path, problem: Problem, params: Any) -> None:
    """Writes the whole network, of what is frozen and of the trained `params`, for `weights.load`.

    With the names of its classes, which `lance_jax.predict` needs.
    """
    trained = as_variables(params)
    variables = {kind: {**of, **trained.get(kind, {})} for kind, of in problem.loaded.items()}
    weights.save(path, problem.whole, variables, problem.classes)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("lance_jax", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"  # lance_jax, run from its folder
    return found


def device() -> str:
    """The accelerator, or the CPU, that JAX computes on."""
    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores"
