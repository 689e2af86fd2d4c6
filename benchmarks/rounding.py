"""Ways to round to 4 bits, by the bits that they take and the gradients that they leave.

    python -m benchmarks.rounding

A value is one of 16 steps between the ends of its group. The ways differ in what a group is, and in
how its ends are stored; "int4" is the library's own. What enters each block is rounded, or each
layer's input, whole or as a core on bases. A record for each is appended to results/rounding.jsonl;
the networks and how the gradients are compared are those of `benchmarks.keep`.
"""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

import lance_jax
from benchmarks import arguments, keep, records, tasks
from lance_jax import block_rule, layer_rule, quantize, train
from lance_jax.pictures import Pictures

STEPS = 15
OWN = "int4"  # the library's
SETTINGS = ("mcunet_all", "vit")
# to the way of `benchmarks.keep`
KEEP = {
    "blocks": "blocks_int4",
    "layers": "int4",
    "block_cores": "blocks_99",
    "layer_cores": "lance",
}


class Scheme(NamedTuple):
    """size: of a group of a core of some shape, neighbouring values of one channel; ends: dtype."""

    size: Callable[[tuple[int, ...]], int]
    ends: Any


SCHEMES = {
    "channel": Scheme(lambda shape: math.prod(shape[:-1]), jnp.float16),
    "sample": Scheme(lambda shape: math.prod(shape[1:-1]), jnp.float16),
    "groups_64": Scheme(lambda shape: 64, jnp.float16),
    "groups_32": Scheme(lambda shape: 32, jnp.float16),
    "groups_32_float8": Scheme(lambda shape: 32, jnp.float8_e4m3fn),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    tasks.cache_compilations()
    for name in given.settings:
        for record in measure(name, keep.SETTINGS[name]):
            print(record, flush=True)
            records.append(records.RESULTS / "rounding.jsonl", record)


def measure(
    name: str, setting: keep.Setting, pictures: Pictures | None = None
) -> Iterator[dict[str, Any]]:
    """A record for each way to round, of what enters blocks and of what enters layers."""
    problem = keep.prepare(setting, pictures)
    exact = keep.loss_of(problem, "everything")
    plain = lance_jax.value_and_grad(exact, trainable=problem.patterns)
    for kept, way in KEEP.items():
        factors = keep.factors_of(problem, keep.WAYS[way])
        for scheme in (OWN, *SCHEMES):
            loss = keep.loss_of(problem, keep.WAYS[way].keep, factors)
            gradient = lance_jax.value_and_grad(loss, trainable=problem.patterns)
            with rounded_by(scheme) as sizes:
                found = keep.cosines(problem, plain, gradient)
            yield {
                "setting": name,
                "keep": kept,
                "scheme": scheme,
                "bits": sum(bits for _, bits in sizes) / sum(values for values, _ in sizes),
                **found,
                "versions": train.versions(),
                "device": train.device(),
            }


@contextlib.contextmanager
def rounded_by(scheme: str) -> Iterator[list[tuple[int, float]]]:
    """Functions that are traced meanwhile store cores so; gives (values, bits) of each of them."""
    sizes: list[tuple[int, float]] = []

    def store(core: jax.Array, core_dtype: str | None) -> quantize.Stored:
        if scheme == OWN:
            stored = quantize.store(core, core_dtype)
            sizes.append((core.size, 8 * sum(a.nbytes for a in jax.tree.leaves(stored))))
            return stored
        size = SCHEMES[scheme].size(core.shape)
        end = 8 * jnp.dtype(SCHEMES[scheme].ends).itemsize
        sizes.append((core.size, core.size * (math.log2(STEPS + 1) + 2 * end / size)))
        return quantize.Stored(rounded(core, size, SCHEMES[scheme].ends))

    with (
        mock.patch.object(block_rule, "store", store),
        mock.patch.object(layer_rule, "store", store),
    ):
        yield sizes


def rounded(core: jax.Array, size: int, ends: Any) -> jax.Array:
    """A core whose last axis is its channel, in steps between the ends of groups of `size`."""
    columns = core.astype(jnp.float32).reshape(-1, core.shape[-1])
    filled = jnp.pad(columns, ((0, -len(columns) % size), (0, 0)), mode="edge")
    groups = filled.reshape(-1, size, core.shape[-1])
    low, high = (
        end.astype(ends).astype(jnp.float32)
        for end in (groups.min(1, keepdims=True), groups.max(1, keepdims=True))
    )
    step = jnp.where(high > low, high - low, 1) / STEPS
    back = low + jnp.clip(jnp.round((groups - low) / step), 0, STEPS) * step
    return back.reshape(filled.shape)[: len(columns)].reshape(core.shape).astype(core.dtype)


if __name__ == "__main__":
    arguments.run(main)
