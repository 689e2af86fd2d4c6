"""Times of a gradient step of every method of the grid: `python -m benchmarks.step_time`.

All steps run in random order in every round, in one process and on the same examples; on a CPU all
through `lance_jax.lower_for_cpu`. Each is compared with `jit`, which is `jax.jit` of
`jax.value_and_grad`; the others are the two phases of `lance_jax.value_and_grad`, as in the
program. The interval of the ratio of medians is a paired bootstrap over rounds.

Then the part of the step in which LANCE and the decomposition of each step's inputs differ, alone:
Gram matrices and eigenvectors of the trained layers' inputs, against LANCE's projection of them.
"""

import argparse
import functools
import random
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import lance_jax
from benchmarks import arguments, finetune, records, rivals, tasks
from lance_jax import loop, modes, quantize, train
from lance_jax.config import Config, base
from lance_jax.loader import Loader
from lance_jax.problem import Problem

WARM_UP = 3  # rounds that compile
PLAIN = "jit"
METHODS = {**finetune.METHODS, **finetune.EXACT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=tasks.MODELS, default=["mcunet", "mobilenetv2"]
    )
    parser.add_argument("--data", nargs="+", choices=tasks.DATA, default=["cifar10"])
    parser.add_argument("--energy", type=arguments.energy, default=base().energy)
    parser.add_argument("--rounds", type=arguments.rounds, default=100)
    given = parser.parse_args()
    for model, data in tasks.pairs(parser, given.models, given.data):
        for record in measure(model, data, given.energy, given.rounds):
            print(record["method"], record["seconds"], record["ratio"], flush=True)
            records.append(records.RESULTS / "step_time.jsonl", record)
        record = measure_decomposition(model, data, given.energy, given.rounds)
        print(record["seconds"], record["ratios"], flush=True)
        records.append(records.RESULTS / "decomposition.jsonl", record)


# --- whole steps ----------------------------------------------------------------------------------


def measure(
    model: str,
    data: str,
    energy: float,
    rounds: int,
    methods: Iterable[str] = tuple(METHODS),
    **settings,
) -> list[dict]:
    """One record for `jit` and for each method, of `rounds` timed rounds."""
    configs = {
        method: config_of(model, data, method, energy, **settings)
        for method in ("backprop", *methods)
    }
    problems = {
        n: finetune.problem_of(tasks.config(model, data, trainable_layers=n, **settings))
        for n in dict.fromkeys(config.trainable_layers for config in configs.values())
    }
    whole = problems[configs["backprop"].trainable_layers]
    loss = loop.loss_of(loop.for_device(whole.train_fn))
    patterns = train.trainable_patterns("backprop", whole.layers)
    steps: dict[str, Callable] = {PLAIN: one_call(loss, patterns, whole.params)}
    for method, config in configs.items():
        steps[method] = two_phases(method, config, problems[config.trainable_layers])
    configs[PLAIN] = configs["backprop"]

    def on_its_problem(name: str) -> Callable:
        place = list(problems).index(configs[name].trainable_layers)
        return lambda *examples: steps[name](*examples[place])

    # the same examples of every problem
    size, seed = configs[PLAIN].batch_size, configs[PLAIN].seed
    each = (batches(one.train, size, seed) for one in problems.values())
    examples = zip(*each, strict=True)
    seconds = interleaved({name: on_its_problem(name) for name in steps}, examples, rounds)
    return [
        {
            "model": model,
            "data": data,
            "method": name,
            "seconds": median(seconds[name]),
            "ratio": ratio(seconds[name], seconds[PLAIN]),
            **_circumstances(rounds, configs[name]),
        }
        for name in steps
    ]


def config_of(model: str, data: str, method: str, energy: float, **settings) -> Config:
    own = {"energy": energy} if method in finetune.HAVE_ENERGY else {}
    return tasks.config(model, data, **settings, **METHODS[method], **own)


def _circumstances(rounds: int, config: Config) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "config": config.to_dict(),
        "versions": train.versions(),
        "device": train.device(),
    }


def one_call(loss: Callable, patterns: list[str], params: Any) -> Callable:
    """(inputs, labels) -> (loss, gradients) by plain backprop, in one compiled program."""
    parts = lance_jax.value_and_grad(loss, trainable=patterns)
    trained, frozen = parts.partition(params)

    @jax.jit
    def step(trained: Any, frozen: Any, *batch: Any) -> Any:
        return jax.value_and_grad(lambda t: loss(parts.merge(t, frozen), *batch))(trained)

    return functools.partial(step, trained, frozen)


def two_phases(method: str, config: Config, problem: Problem) -> Callable:
    """(inputs, labels) -> (loss, gradients) by a method, as the program computes them."""
    step = lance_jax.value_and_grad(
        loop.for_device(loss_by(method, config, problem)),
        trainable=train.trainable_patterns(config.method, problem.layers),
        micro_batch=config.micro_batch,
    )
    return functools.partial(step, problem.params)


def loss_by(method: str, config: Config, problem: Problem) -> Callable[[Any, Any, Any], Any]:
    """What a method trains by, with what it does about the bytes that are kept."""
    if method == "hosvd":
        (ranks,) = rivals.batch_ranks(config, problem, problem.params, 1)
        return loop.loss_of(rivals.hosvd(config, problem, ranks))
    loss = train.loss_fn(config, config.method, problem.train_fn)
    if method == "checkpoint":
        return train.loss_in_blocks(loss)
    if config.method == "backprop":
        return loss
    lance = config.method == "lance"
    return lance_jax.compress(
        loss, train.calibration(config, problem)() if lance else lance_jax.Factors()
    )


# --- the decomposition alone ----------------------------------------------------------------------


def measure_decomposition(
    model: str, data: str, energy: float, rounds: int, **settings
) -> dict[str, Any]:
    """Seconds to decompose the inputs of all trained layers, and for LANCE to project them."""
    config = config_of(model, data, "lance", energy, **settings)
    problem = finetune.problem_of(tasks.config(model, data, **settings))
    factors = train.calibration(config, problem)()
    inputs = jax.jit(loop.for_device(functools.partial(rivals.layer_inputs, problem)))

    def project(inputs: dict[str, jax.Array], core_dtype: str | None) -> Any:
        return {
            path: quantize.store(core(x, factors[path].bases), core_dtype)
            for path, x in inputs.items()
        }

    calls = {
        "decomposition": jax.jit(decompose),
        "projection": jax.jit(functools.partial(project, core_dtype=None)),
        "projection_int4": jax.jit(functools.partial(project, core_dtype="int4")),
    }
    drawn = batches(problem.train, config.batch_size, config.seed)
    examples = ((inputs(problem.params, x),) for x, _ in drawn)
    seconds = interleaved(calls, examples, rounds)
    return {
        "model": model,
        "data": data,
        "energy": energy,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "ratios": {
            name: ratio(seconds["decomposition"], seconds[name])
            for name in calls
            if name != "decomposition"
        },
        **_circumstances(rounds, config),
    }


def decompose(inputs: dict[str, jax.Array]) -> Any:
    """Eigenvalues and eigenvectors of every mode of every layer input."""
    return {
        path: [rivals.decompose(rivals.gram(x, axis)) for axis in range(x.ndim)]
        for path, x in inputs.items()
    }


def core(x: jax.Array, bases: Any) -> jax.Array:
    """The core (batch, height, width, channel) as a compressed convolution computes it."""
    matrices = {rivals.MODES.index(mode): basis for mode, basis in bases.items()}
    steps = tuple((axis, *basis.shape) for axis, basis in matrices.items())
    _, order = modes.cheapest_chain(x.size, steps)
    return modes.apply_chain(x, matrices, order, None)


# --- timing ---------------------------------------------------------------------------------------


def batches(
    examples: loop.Examples, batch_size: int, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Endless batches (inputs, labels)."""
    for indices in Loader(len(examples.labels), batch_size, seed):
        yield jnp.asarray(examples.read(indices)), jnp.asarray(examples.labels[indices])


def interleaved(
    steps: dict[str, Callable], batches: Iterable[Any], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    seconds = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _, batch in zip(range(WARM_UP + rounds), batches, strict=False):
        jax.block_until_ready(batch)
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*batch))
            seconds[name].append(time.perf_counter() - start)
    return {name: measured[WARM_UP:] for name, measured in seconds.items()}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of the medians and its 95 % bootstrap interval, rounds drawn in pairs."""

    def statistic(a, b, axis):
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    interval = stats.bootstrap(
        (ours, theirs), statistic, paired=True, method="percentile", rng=0
    ).confidence_interval
    return {
        "median": median(ours) / median(theirs),
        "low": float(interval.low),
        "high": float(interval.high),
    }


if __name__ == "__main__":
    arguments.run(main)
