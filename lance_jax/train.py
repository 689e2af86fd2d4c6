"""Fine-tunes one network by several methods that differ in nothing but what they train and keep."""

import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from lance_jax import devices, metrics
from lance_jax.config import Config, check, names, needs_whole_batch
from lance_jax.loader import Loader, read_ahead
from lance_jax.loop import ApplyFn, Examples, Fitted, fit, for_device, loss_of
from lance_jax.memory import Report, SavedBytes
from lance_jax.models import weights
from lance_jax.models.network import as_variables
from lance_jax.problem import Problem, prepare


def compare(config: Config, workdir: str | Path) -> list[dict[str, Any]]:
    """Runs every method of `config.method` under `workdir` and prints the comparison."""
    check(config, workdir)
    problem = prepare(config, workdir)
    _check_modes(config, problem)
    results = [run(config, workdir, method, problem) for method in names(config.method)]
    metrics.show_table(results)
    return results


def _check_modes(config: Config, problem: Problem) -> None:
    """ValueError for a mode that none of LANCE's layers or blocks has, before anything trains."""
    asked = set(names(config.modes)) - {"paper", "none"}
    if not asked or "lance" not in names(config.method):
        return
    picture = problem.train.read([0])[0]
    batch = jax.ShapeDtypeStruct((config.batch_size, *picture.shape), jnp.float32)
    found = lance_jax.layers(kept_of(config, problem), problem.params, batch)
    chosen = [one for one in found if any(re.search(p, one.path) for p in select(config, problem))]
    known = list(dict.fromkeys(mode.split(".")[-1] for layer in chosen for mode in layer.modes))
    if not asked <= set(known):
        raise ValueError(
            f"config.modes is {config.modes!r}, but the {config.keep} that LANCE compresses have "
            f"no others than {', '.join(known)}"
        )


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


# The names of the blocks in all networks here. What enters the first is the batch, which is an
# argument of the step: to keep it costs nothing, and a core of it would.
STEM = "stem"
BLOCKS = rf"{STEM}|blocks_\d+|features"
HEAD = "head"


def fit_method(config: Config, problem: Problem, method: str, directory: Path) -> Fitted:
    """Trains one method in `directory`, or goes on there.

    LANCE is compressed with its factors, head and bias with none, which packs their masks; backprop
    is plain JAX.
    """
    calibrate = {"backprop": None, "lance": calibration(config, problem)}
    return fit(
        loss_fn(config, method, problem.train_fn),
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


def recomputes(config: Config, method: str) -> bool:
    """Whether a method keeps what enters the blocks, and recomputes them."""
    return method == "lance" and config.keep == "blocks"


def in_blocks(apply_fn: ApplyFn) -> ApplyFn:
    """The same network with each block under a `jax.checkpoint`."""
    return lance_jax.blocks(for_device(apply_fn), BLOCKS)


def loss_fn(config: Config, method: str, apply_fn: ApplyFn) -> Callable[..., Any]:
    """The loss that a method trains by."""
    loss = loss_of(apply_fn, trains_statistics(config))
    return loss_in_blocks(loss) if recomputes(config, method) else loss


def loss_in_blocks(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The same loss with each block of its network under a `jax.checkpoint`.

    The head is one more, and holds the loss, so that nothing is kept of the logits.
    """
    return lance_jax.blocks(for_device(loss), rf"{BLOCKS}|^{HEAD}(?=/)")


def trains_statistics(config: Config) -> bool:
    """Whether batch norm uses and trains the batch's own statistics."""
    return config.get("batch_stats") == "trained"


# The methods


def trainable_patterns(method: str, layers: Sequence[str]) -> list[str]:
    """Regular expressions of the parameters that a method trains, over paths in `params`."""
    # with batch norm behind it, a layer's bias is that of the norm
    leaves = {"head": [], "bias": ["(_norm)?/bias"]}.get(method, ["(_norm)?/bias", "/kernel"])
    return ["^head/", *(f"^{layer}{leaf}$" for layer in layers for leaf in leaves)]


def calibration(config: Config, problem: Problem) -> Callable[[], lance_jax.Factors]:
    """A function that gives LANCE's factors, from the first training batches, forward only.

    Of the head's input, which is small, only the bits are cut; where blocks are kept, the head is a
    block, too (`loss_in_blocks`).
    """
    modes = {"": None, "paper": "paper", "none": ()}.get(config.modes, names(config.modes))
    core_dtype = config.core_dtype or None
    by_block = config.keep == "blocks"

    def calibrate() -> lance_jax.Factors:
        order = Loader(len(problem.train.labels), config.batch_size, config.seed)
        batches = itertools.islice(order, config.calibration_batches)
        factors = lance_jax.calibrate(
            kept_of(config, problem),
            problem.params,
            map(jnp.asarray, read_ahead(problem.train.read, batches)),
            select=select(config, problem),
            energy=config.energy,
            modes=modes,
            core_dtype=core_dtype,
        )
        head = HEAD if by_block else f"{HEAD}/kernel"
        in_bits = lance_jax.LayerFactors({}, core_dtype=core_dtype)
        return lance_jax.Factors({**factors, head: in_bits}, factors.skipped)

    return calibrate


def kept_of(config: Config, problem: Problem) -> ApplyFn:
    """The network in which LANCE's layers or blocks are found."""
    return (in_blocks if config.keep == "blocks" else for_device)(problem.train_fn)


def select(config: Config, problem: Problem) -> list[str]:
    """Regular expressions of LANCE's layers or blocks."""
    if config.keep == "blocks":
        return [f"^(?!{STEM}$)({BLOCKS})$"]
    return [f"^{layer}/" for layer in problem.layers]


def saved_bytes(
    config: Config, method: str, problem: Problem, fitted: Fitted
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that a step keeps for its backward pass: the method's, and plain backprop's.

    Counted for the whole network, by shapes: with cached features the first trained layer's input
    is an argument, which costs plain backprop nothing. In micro-batches the method keeps what one
    of them needs, and each device's sum of the gradients. Plain backprop's is the fair figure of
    `lance_jax.report`, for all the trainable layers and the whole batch. "transient" is what a
    recomputed block holds on top while the backward pass is in it.
    """
    train_fn, params, picture = problem.network
    loss = loss_fn(config, method, train_fn)

    def report(method: str, size: int) -> Report:
        batch = (
            jax.ShapeDtypeStruct((size, *picture), jnp.float32),
            jax.ShapeDtypeStruct((size,), problem.train.labels.dtype),
        )
        patterns = trainable_patterns(method, problem.layers)
        return lance_jax.report(loss, params, *batch, factors=fitted.factors, trainable=patterns)

    def counts(saved: SavedBytes, extra: int = 0, transient: int = 0) -> dict[str, int]:
        found = {"layer_inputs": saved.layer_inputs, "total": saved.total + extra}
        return {name: int(n) for name, n in {**found, "transient": transient}.items()}

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
    return counts(saved, sums, found.transient), backprop


def accuracy(problem: Problem, params: Any, batch_size: int) -> float:
    """Share of the evaluation examples, unmirrored, that the network classifies rightly."""
    logits = for_device(problem.apply_fn)
    predict = jax.jit(lambda params, inputs: jnp.argmax(logits(params, inputs), axis=-1))
    mesh = devices.mesh_for(batch_size)
    params = devices.replicate(params, mesh)
    return share_right(
        lambda batch: predict(params, devices.spread(batch, mesh)), problem.evaluation, batch_size
    )


def share_right(predict: Callable[[Any], jax.Array], examples: Examples, batch_size: int) -> float:
    """Share of the examples whose label is what `predict` gives of a batch of their inputs."""
    labels = examples.labels
    n, right = len(labels), 0
    # a full last batch: no second compile
    batches = [np.arange(start, start + batch_size) % n for start in range(0, n, batch_size)]
    inputs = read_ahead(examples.read, batches)
    for start, indices, batch in zip(range(0, n, batch_size), batches, inputs, strict=True):
        predicted = np.asarray(predict(batch))
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
    """The accelerator, or the CPU, that JAX computes on, and the number of CPU cores."""
    kind = jax.devices()[0].device_kind
    return f"{_cpu_model() if kind == 'cpu' else kind}, {os.cpu_count()} CPU cores"


def _cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "cpu"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
