"""How near LANCE's weight gradients are to plain backprop's: `python -m benchmarks.gradients`.

The cosine of the two gradients of each compressed layer, at the same parameters and on the same
batches, mean over batches: after calibration with a trained head, and at the end of training.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from benchmarks import records, tasks
from benchmarks.step_time import batches
from lance_jax import loop, train

BATCHES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=tasks.DATA, default="cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for record in measure(arguments.data, seed):
            print(record)
            records.append(records.RESULTS / "gradients.jsonl", record)


def measure(data: str, seed: int, **settings) -> list[dict]:
    """Two records, `when` being "calibration" and "end"; `cosines` by path of the layer."""
    config = tasks.config(data, seed=seed, **settings)
    workdir = tasks.RUNS / f"gradients-{data}-{seed}"
    problem = train.prepare(config, workdir)
    head, lance = (
        train.fit_method(config, problem, method, workdir / method) for method in ("head", "lance")
    )
    return [
        {
            "data": data,
            "seed": seed,
            "when": when,
            "cosines": cosines(config, problem, lance.factors, params),
            "config": config.to_dict(),
            "versions": train.versions(),
        }
        for when, params in {"calibration": head.params, "end": lance.params}.items()
    ]


def cosines(config, problem, factors, params) -> dict[str, float]:
    """Path of each layer -> cosine of its kernel's two gradients, mean over `BATCHES` batches."""
    trainable = train.trainable_patterns("lance", problem.layers)
    plain, fast = (
        lance_jax.value_and_grad(loop.loss_of(loop.for_device(apply_fn)), trainable=trainable)
        for apply_fn in (problem.apply_fn, lance_jax.compress(problem.apply_fn, factors))
    )
    found = {layer: [] for layer in problem.layers}
    for batch in itertools.islice(batches(config, problem), BATCHES):
        (_, exact), (_, ours) = plain(params, *batch), fast(params, *batch)
        for layer in found:
            block, name = layer.split("/")
            found[layer].append(cosine(exact[block][name]["kernel"], ours[block][name]["kernel"]))
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def cosine(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


if __name__ == "__main__":
    main()
