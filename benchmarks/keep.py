"""What a step may keep, and what each way costs and gives: `python -m benchmarks.keep`.

Plain backprop, `jax.checkpoint` of every block, inputs in low bits, and LANCE by layers and by
blocks, each of them with the whole batch at a time, some in micro-batches of 8 and 1 as well. Of
each way: bytes between the two phases, and what the backward pass holds beside them; the time of a
gradient, all ways in turn in each round, in random order; the cosines of its gradients and plain
backprop's, of all parameters and of the worst layer, mean over batches; and the loss after a fixed
number of steps. Before anything is measured, plain backprop trains for some steps, since a new head
(and a network that was never trained) says little about gradients.

A record for each way is appended to results/keep.jsonl; a network takes from minutes to an hour.
Pictures are CIFAR-10's. MCUNet-5fps has its published weights. ResNet-18 and the vision transformer
are drawn at random, as no weights of theirs are at hand.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from statistics import fmean, median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lance_jax
from benchmarks import arguments, networks, records, tasks
from benchmarks.gradients import cosine
from benchmarks.step_time import PLAIN, batches, interleaved, one_call, ratio
from lance_jax import loop, train
from lance_jax.models.network import apply_fn
from lance_jax.norm_statistics import norm_statistics
from lance_jax.paths import leaves_with_path
from lance_jax.pictures import Pictures
from lance_jax.problem import trained_layers

CALIBRATION = 8  # batches
COMPARED = 8  # batches whose gradients are compared
LEARNING_RATE, MOMENTUM, CLIP = 0.01, 0.9, 2.0
LAST = 10  # steps whose mean loss is told
ALL = "/(kernel|bias|scale)$"


class Setting(NamedTuple):
    """A network of `networks.load`, the number of its last layers that train, and of steps."""

    network: str
    batch_size: int
    last: int | None = None
    warm_up: int = 100
    steps: int = 60


SETTINGS = {
    "mcunet_last4": Setting("mcunet-5fps", 64, last=4),
    "mcunet_all": Setting("mcunet-5fps", 64),
    "resnet18": Setting("resnet18-224px", 16, warm_up=60, steps=20),
    "vit": Setting("vit", 64, warm_up=200),
    # one picture at a time, and large
    "resnet18_one": Setting("resnet18-448px", 1, warm_up=60, steps=20),
    "vit_one": Setting("vit-2026-tokens", 1, warm_up=60, steps=20),
}


class Way(NamedTuple):
    """What is kept: "everything", or of the "layers" or the "blocks" what `calibrate` is told.

    inside: whether a recomputed block stores its layers' inputs in `core_dtype`, too.
    """

    keep: str
    energy: float = 1.0
    modes: Any = ()
    core_dtype: str | None = None
    exact: bool = False
    inside: bool = False


WAYS = {
    "backprop": Way("everything", exact=True),
    "checkpoint": Way("blocks", exact=True),
    "int8": Way("layers", core_dtype="int8"),
    "int4": Way("layers", core_dtype="int4"),
    "lance": Way("layers", 0.96, None, "int4"),
    "paper": Way("layers", 0.7, "paper"),
    "blocks_int8": Way("blocks", core_dtype="int8"),
    "blocks_int4": Way("blocks", core_dtype="int4"),
    "blocks_layers_int4": Way("blocks", core_dtype="int4", inside=True),
    "blocks_int4_stochastic": Way("blocks", core_dtype="int4_stochastic"),
    "blocks_999_int8": Way("blocks", 0.999, None, "int8"),
    "blocks_99_int8": Way("blocks", 0.99, None, "int8"),
    "blocks_99": Way("blocks", 0.99, None, "int4"),
    "blocks_97": Way("blocks", 0.97, None, "int4"),
    "blocks_95": Way("blocks", 0.95, None, "int4"),
    "blocks_90": Way("blocks", 0.90, None, "int4"),
}
MICRO_BATCHES = (8, 1)
IN_MICRO_BATCHES = ("backprop", "checkpoint", "lance", "blocks_int4", "blocks_layers_int4")
IN_MICRO_BATCHES += ("blocks_99", "blocks_95")


class Problem(NamedTuple):
    """A setting that is ready to be measured.

    Attributes:
      apply: (params, pictures) -> logits.
      params: after the steps of plain backprop.
      patterns: of the trained parameters.
      layers: paths of the trained layers, the head's the last.
      blocks: names of the blocks that they stand in.
    """

    setting: Setting
    apply: Callable
    params: Any
    patterns: list[str]
    layers: list[str]
    blocks: list[str]
    pictures: Pictures


class Step(NamedTuple):
    """A way at work: the compressed function's gradient, and the bytes that it keeps."""

    gradient: Callable
    told: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="networks [all]"
    )
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is kept [all]"
    )
    parser.add_argument(
        "--rounds", type=arguments.rounds, default=10, help="of timing, each way once in each [10]"
    )
    given = parser.parse_args()
    tasks.cache_compilations()
    for name in given.settings:
        for record in measure(name, SETTINGS[name], given.ways, given.rounds):
            print(record, flush=True)
            records.append(records.RESULTS / "keep.jsonl", record)


def measure(
    name: str, setting: Setting, ways: list[str], rounds: int, pictures: Pictures | None = None
) -> Iterator[dict[str, Any]]:
    """A record for each way and micro-batch."""
    print(f"{name}: {setting.warm_up} steps of plain backprop", flush=True)
    problem = prepare(setting, pictures)
    print(f"{name}: calibrating", flush=True)
    steps = dict(_steps(problem, ways))
    print(f"{name}: {rounds} rounds of {len(steps)} ways, after compiling them", flush=True)
    loss = loss_of(problem, "everything")
    plain = lance_jax.value_and_grad(loss, trainable=problem.patterns)
    calls: dict[Any, Callable] = {PLAIN: one_call(loss, problem.patterns, problem.params)}
    for key, step in steps.items():
        calls[key] = functools.partial(step.gradient, problem.params)
    seconds: Any = interleaved(calls, drawn(problem, 1), rounds)
    losses: dict[str, float] = {"exact": _loss(problem, plain)}
    for key, step in steps.items():
        way, size = WAYS[key[0]], key[1]
        whole = size == setting.batch_size
        if not way.exact and whole:
            losses[key[0]] = _loss(problem, step.gradient)
        yield {
            "setting": name,
            "way": key[0],
            "micro_batch": size,
            **step.told,
            "seconds": median(seconds[key]),
            "ratio": ratio(seconds[key], seconds[PLAIN]),
            **({} if way.exact else cosines(problem, plain, step.gradient)),
            "loss": losses.get("exact" if way.exact else key[0]),
            "rounds": rounds,
            **setting._asdict(),
            "versions": train.versions(),
            "device": train.device(),
        }


# --- the problem ----------------------------------------------------------------------------------


def prepare(setting: Setting, pictures: Pictures | None = None) -> Problem:
    """The network after some steps of plain backprop; by default on CIFAR-10's pictures."""
    network, params = networks.load(setting.network)
    pictures = tasks.pictures("cifar10", network.picture[0]) if pictures is None else pictures
    example = jax.ShapeDtypeStruct((1, *network.picture), jnp.float32)
    found = lance_jax.layers(train.in_blocks(apply_fn(network)), params, example)
    blocks = [layer.path for layer in found if layer.kind == "block"]
    layers = [layer.path for layer in found if layer.kind != "block"]
    patterns = [ALL]
    if setting.last is not None:
        names, _ = trained_layers(network, setting.last)
        patterns = train.trainable_patterns("lance", names)
        layers = [path for path in layers if path.rpartition("/")[0] in (*names, "head")]
        blocks = [block for block in blocks if any(p.startswith(f"{block}/") for p in layers)]
    problem = Problem(setting, apply_fn(network), params, patterns, layers, blocks, pictures)
    if "batch_stats" in params and setting.network in networks.DRAWN:
        own = apply_fn(network.clone(batch_stats="trained"))
        seen = (x for x, _ in itertools.islice(drawn(problem, 0), CALIBRATION))
        params = {**params, "batch_stats": norm_statistics(own, params, seen)}
        problem = problem._replace(params=params)
    plain = lance_jax.value_and_grad(loss_of(problem, "everything"), trainable=patterns)
    return problem._replace(params=train_for(problem, plain, setting.warm_up)[0])


def drawn(problem: Problem, seed: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    return batches(problem.pictures, problem.setting.batch_size, seed)


# --- the ways -------------------------------------------------------------------------------------


def _steps(problem: Problem, ways: list[str]) -> Iterator[tuple[tuple[str, int], Step]]:
    whole = problem.setting.batch_size
    for name in ways:
        factors = factors_of(problem, WAYS[name])
        smaller = [size for size in MICRO_BATCHES if size < whole]
        for size in [whole, *(smaller if name in IN_MICRO_BATCHES else ())]:
            yield (name, size), step_of(problem, WAYS[name], factors, size)


def step_of(problem: Problem, way: Way, factors: lance_jax.Factors | None, size: int) -> Step:
    """The gradient in micro-batches of `size`, and bytes of one of them."""
    whole = problem.setting.batch_size
    gradient = lance_jax.value_and_grad(
        loss_of(problem, way.keep, factors),
        trainable=problem.patterns,
        micro_batch=None if size == whole else size,
    )
    example = problem.pictures.read([0])[0]
    batch = (
        jax.ShapeDtypeStruct((size, *example.shape), jnp.float32),
        jax.ShapeDtypeStruct((size,), problem.pictures.labels.dtype),
    )
    found = lance_jax.report(
        loss_of(problem, way.keep),
        problem.params,
        *batch,
        factors=factors,
        trainable=problem.patterns,
    )
    kept = found.saved_bytes_backprop if way.keep == "everything" else found.saved_bytes
    trained = jax.tree.leaves(gradient.partition(problem.params)[0])
    told = {
        "kept": int(kept.total),
        "transient": int(found.transient),
        "factors": int(found.factor_bytes),
        # while there are other micro-batches to come, the sum of the gradients is held, too
        "sums": 0 if size == whole else sum(leaf.nbytes for leaf in trained),
        "macs_recomputed": int(found.macs_recomputed),
    }
    return Step(gradient, told)


def factors_of(problem: Problem, way: Way) -> lance_jax.Factors | None:
    """Calibrated; of the head's input, and of layers in blocks, only the bits are cut.

    No core of what enters the stem: it is an argument of the step, which costs nothing to keep.
    """
    if way.exact:
        return None
    *layers, head = problem.layers
    chosen = problem.blocks if way.keep == "blocks" else layers
    seen = (x for x, _ in itertools.islice(drawn(problem, 0), CALIBRATION))
    factors = lance_jax.calibrate(
        _kept_by(problem, way.keep),
        problem.params,
        seen,
        select=[f"^{path}$" for path in chosen if not path.startswith(train.STEM)],
        energy=way.energy,
        modes=way.modes,
        core_dtype=way.core_dtype,
    )
    in_bits = lance_jax.LayerFactors({}, core_dtype=way.core_dtype)
    others = layers if way.inside else []
    return lance_jax.Factors({**factors, **dict.fromkeys([*others, head], in_bits)})


def loss_of(problem: Problem, keep: str, factors: lance_jax.Factors | None = None) -> Callable:
    """(params, pictures, labels) -> loss."""
    fn = _kept_by(problem, keep)
    if factors is not None:
        fn = loop.for_device(lance_jax.compress(fn, factors))
    return loop.loss_of(fn)


def _kept_by(problem: Problem, keep: str) -> Callable:
    return train.in_blocks(problem.apply) if keep == "blocks" else loop.for_device(problem.apply)


# --- what they give -------------------------------------------------------------------------------


def cosines(problem: Problem, plain: Callable, ours: Callable) -> dict[str, Any]:
    """Of all trained parameters, and of the layer where it is least."""
    overall, by_layer = [], {path: [] for path in problem.layers}
    for x, y in itertools.islice(drawn(problem, 2), COMPARED):
        exact, found = (dict(leaves_with_path(fn(problem.params, x, y)[1])) for fn in (plain, ours))
        for path, values in by_layer.items():
            values.append(cosine(exact[path], found[path]))
        overall.append(cosine(_flat(exact), _flat(found)))
    means = {path: fmean(values) for path, values in by_layer.items()}
    worst = min(means, key=lambda path: means[path])
    return {"cosine": fmean(overall), "worst_cosine": means[worst], "worst_layer": worst}


def _flat(gradients: dict[str, Any]) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in gradients.values() if leaf is not None])


def _loss(problem: Problem, gradient: Callable) -> float:
    """Mean loss of the last steps."""
    return fmean(train_for(problem, gradient, problem.setting.steps, seed=3)[1][-LAST:])


def train_for(
    problem: Problem, gradient: Any, steps: int, seed: int = 4
) -> tuple[Any, list[float]]:
    """The params after some steps, and the loss of each."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    )
    trained, frozen = gradient.partition(problem.params)
    state, losses = optimizer.init(trained), []

    @jax.jit
    def update(grads: Any, state: Any, trained: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    for x, y in itertools.islice(drawn(problem, seed), steps):
        loss, grads = gradient(gradient.merge(trained, frozen), x, y)
        trained, state = update(grads, state, trained)
        losses.append(float(loss))
    return gradient.merge(trained, frozen), losses


if __name__ == "__main__":
    arguments.run(main)
