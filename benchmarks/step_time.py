"""Time of a gradient step, plain and compressed in turn: `python -m benchmarks.step_time`.

Two forms of plain backprop over the same trainable parameters: `jax.jit` of `jax.value_and_grad`,
and the library's two phases; on a CPU all with the same fast depthwise convolutions. The three
steps run in random order in every round, on the same batch; the interval of the ratio of medians is
a paired bootstrap over rounds.
"""

import argparse
import random
import time
from collections.abc import Callable
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import lance_jax
from benchmarks import records, tasks
from lance_jax import loop, train
from lance_jax.loader import Loader

WARM_UP = 3  # rounds that compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=tasks.DATA, default=["cifar10"])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    for name in arguments.data:
        for record in measure(name, arguments.rounds):
            print(record)
            records.append(records.RESULTS / "step_time.jsonl", record)


def measure(name: str, rounds: int, **settings) -> list[dict]:
    """One record for each form of plain backprop, of `rounds` timed rounds."""
    config = tasks.config("digits" if name == "digits" else "mcunet", name, **settings)
    problem = train.prepare(config, tasks.RUNS / f"step_time-{name}")
    seconds = interleaved(gradient_steps(config, problem), batches(config, problem), rounds)
    return [
        {
            "data": name,
            "baseline": baseline,
            "seconds": {
                "backprop": median(seconds[baseline]),
                "lance": median(seconds["lance"]),
            },
            "ratio": ratio(seconds["lance"], seconds[baseline]),
            "rounds": rounds,
            "config": config.to_dict(),
            "versions": train.versions(),
            "device": train.device(),
        }
        for baseline in seconds
        if baseline != "lance"
    ]


def gradient_steps(config, problem) -> dict[str, Callable]:
    """Functions (inputs, labels) -> (loss, gradients) at the problem's parameters, by name."""
    trainable = train.trainable_patterns("lance", problem.layers)
    factors = train.calibration(config, problem)()
    compressed = lance_jax.compress(problem.apply_fn, factors)
    loss, fast_loss = (
        loop.loss_of(loop.for_device(apply_fn)) for apply_fn in (problem.apply_fn, compressed)
    )
    plain = lance_jax.value_and_grad(loss, trainable=trainable)
    fast = lance_jax.value_and_grad(fast_loss, trainable=trainable)
    trained, frozen = plain.partition(problem.params)

    @jax.jit
    def one_call(trained, frozen, *batch):
        return jax.value_and_grad(lambda t: loss(plain.merge(t, frozen), *batch))(trained)

    return {
        "jax.jit of jax.value_and_grad": lambda *batch: one_call(trained, frozen, *batch),
        "in two phases": lambda *batch: plain(problem.params, *batch),
        "lance": lambda *batch: fast(problem.params, *batch),
    }


def batches(config, problem):
    """Endless training batches (inputs, labels)."""
    for indices in Loader(len(problem.train.labels), config.batch_size, config.seed):
        inputs = jnp.asarray(problem.train.read(indices))
        yield inputs, jnp.asarray(problem.train.labels[indices])


def interleaved(steps: dict[str, Callable], batches, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    seconds = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _, batch in zip(range(WARM_UP + rounds), batches, strict=False):
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
    main()
