"""Ways to round to 4 bits, by the bits that they take and the gradients that they leave.

    python -m benchmarks.rounding

A value is one of 16 steps between the ends of its group. The ways differ in what a group is, and in
how its ends are stored; "int4" is the library's own. What enters each block is rounded, or each
layer's input. A record for each is appended to results/rounding.jsonl; the networks and how the
gradients are compared are those of `benchmarks.keep`.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lance_jax
from benchmarks import arguments, keep, records, tasks
from lance_jax import quantize, train
from lance_jax.pictures import Pictures
from lance_jax.step import ValueAndGrad

STEPS = 15
OWN = "int4"  # the library's
CARRIER = "bfloat16"  # what inputs are kept in before and after: fine beside 4 bits
SETTINGS = ("mcunet_all", "vit")
KEEP = {"blocks": "blocks_int4", "layers": "int4"}  # to the way of `benchmarks.keep`


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
    batch = next(keep.drawn(problem, 2))
    for kept, way in KEEP.items():
        own, carrier = (_stored(problem, way, dtype) for dtype in (OWN, CARRIER))
        saved = jax.eval_shape(carrier.forward, problem.params, *batch)[1]
        inputs = list(filter(_is_input, jax.tree.leaves(saved)))
        for scheme in (OWN, *SCHEMES):
            ours = own if scheme == OWN else _gradient(carrier, scheme)
            yield {
                "setting": name,
                "keep": kept,
                "scheme": scheme,
                "bits": bits(scheme, inputs),
                **keep.cosines(problem, plain, ours),
                "versions": train.versions(),
                "device": train.device(),
            }


def _stored(problem: keep.Problem, way: str, core_dtype: str) -> ValueAndGrad:
    chosen = keep.WAYS[way]._replace(core_dtype=core_dtype)
    loss = keep.loss_of(problem, chosen.keep, keep.factors_of(problem, chosen))
    return lance_jax.value_and_grad(loss, trainable=problem.patterns)


def _is_input(kept: Any) -> bool:
    """Of what is kept between the phases: nothing else has the carrier's dtype."""
    return kept.dtype == CARRIER


def _gradient(carrier: ValueAndGrad, scheme: str) -> Callable:
    """The gradient from inputs that are rounded between the two phases."""
    size, ends = SCHEMES[scheme]

    @jax.jit
    def round_all(saved: Any) -> Any:
        return jax.tree.map(lambda x: rounded(x, size(x.shape), ends) if _is_input(x) else x, saved)

    def gradient(params: Any, *batch: Any) -> Any:
        value, saved = carrier.forward(params, *batch)
        return value, carrier.backward(round_all(saved), params, *batch)

    return gradient


def bits(scheme: str, inputs: list[Any]) -> float:
    """Bits that a value takes, mean over all inputs."""
    return sum(_bits(scheme, one) for one in inputs) / sum(one.size for one in inputs)


def _bits(scheme: str, x: Any) -> float:
    if scheme == OWN:
        stored = jax.eval_shape(functools.partial(quantize.store, core_dtype=OWN), x)
        return 8.0 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stored))
    ends = 2 * 8 * jnp.dtype(SCHEMES[scheme].ends).itemsize
    return x.size * (math.log2(STEPS + 1) + ends / SCHEMES[scheme].size(x.shape))


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
