"""How near LANCE's weight gradients are to plain backprop's: `python -m benchmarks.gradients`.

The cosine of the two gradients of each compressed layer, at the same parameters and on the same
batches, mean over batches: after calibration with a trained head, for several energies, and at the
end of training. A seed takes some minutes; give the missing `--seeds` to go on.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from benchmarks import arguments, records, tasks
from benchmarks.step_time import batches
from lance_jax import loop, train
from lance_jax.problem import prepare

BATCHES = 8
ENERGIES = (0.9, 0.95, 0.96, 0.97, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tasks.MODELS, default="mcunet")
    parser.add_argument("--data", choices=tasks.DATA, default="cifar10")
    parser.add_argument("--seeds", type=arguments.seed, nargs="+", default=list(range(5)))
    energies = {"type": arguments.energy, "default": list(ENERGIES)}
    parser.add_argument("--energies", nargs="+", **energies)
    given = parser.parse_args()
    ((model, data),) = tasks.pairs(parser, [given.model], [given.data])
    for seed in given.seeds:
        for record in measure(model, data, seed, given.energies):
            print(record)
            records.append(records.RESULTS / "gradients.jsonl", record)


def measure(
    model: str, data: str, seed: int, energies: Iterable[float] = ENERGIES, **settings
) -> Iterator[dict]:
    """Records with `cosines` by path of the layer; `when` is "calibration" or "end".

    After calibration for each of the energies, with the parameters of a trained head; at the end
    for the configuration's own.
    """
    config: Any = tasks.config(model, data, seed=seed, **settings)
    workdir = tasks.RUNS / f"gradients-{data}-{seed}"
    problem = prepare(config, workdir)
    head, lance = (
        train.fit_method(config, problem, method, workdir / method) for method in ("head", "lance")
    )

    def record(when: str, energy: float, factors, params) -> dict:
        fitted = lance._replace(factors=factors)
        saved, saved_backprop = train.saved_bytes(config, "lance", problem, fitted)
        return {
            "data": data,
            "seed": seed,
            "when": when,
            "energy": energy,
            "cosines": cosines(config, problem, factors, params),
            "times_fewer": saved_backprop["total"] / saved["total"],
            "config": config.to_dict(),
            "versions": train.versions(),
            "device": train.device(),
        }

    for energy in energies:
        other = config.copy_and_resolve_references()
        other.energy = energy
        factors = train.calibration(other, problem)()
        yield record("calibration", energy, factors, head.params)
    yield record("end", config.energy, lance.factors, lance.params)


def cosines(config, problem, factors, params) -> dict[str, float]:
    """Path of each layer -> cosine of its kernel's two gradients, mean over `BATCHES` batches."""
    trainable = train.trainable_patterns("lance", problem.layers)
    plain, fast = (
        lance_jax.value_and_grad(loop.loss_of(loop.for_device(apply_fn)), trainable=trainable)
        for apply_fn in (problem.apply_fn, lance_jax.compress(problem.apply_fn, factors))
    )
    found = {layer: [] for layer in problem.layers}
    drawn = batches(problem.train, config.batch_size, config.seed)
    for batch in itertools.islice(drawn, BATCHES):
        (_, exact), (_, ours) = plain(params, *batch), fast(params, *batch)
        for layer in found:
            block, name = layer.split("/")
            found[layer].append(cosine(exact[block][name]["kernel"], ours[block][name]["kernel"]))
    return {layer: float(np.mean(values)) for layer, values in found.items()}


def cosine(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


if __name__ == "__main__":
    arguments.run(main)
