"""How a core is stored: as it is, in bfloat16, or in 8 or 4 bits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STEPS = {"int8": 255, "int4": 15}  # between the bounds of a group
_GROUP = 32  # neighbouring values of a channel, at most, that share bounds
_FEW = 16  # values of a channel that are too few for a group
_RANGE = 32  # neighbouring groups that share the range in which their bounds lie
# Between the ends of a range. Two more fill a byte: its ends are rounded outwards to whole units.
# The half keeps the greatest of values from 0 on off a whole unit, where rounding errors decide.
_UNITS = 253.5
# What is taken for larger than that, such as the -inf of a mask: so that no range overflows.
_MOST = float(np.finfo(np.float32).max) / 4
_ODD = 0x9E3779B9  # the golden ratio of 2**32
_MIX = ((16, 0x85EBCA6B), (13, 0xC2B2AE35))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored core.

    data: the core itself; uint8 values of its shape; or uint8 (pairs, channels), of two 4-bit
      values of a channel each.
    groups: what these values mean; None if they are the core itself.
    """

    data: Any
    groups: "Groups | None" = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """The least and the greatest value of each group of values.

    bounds: uint8 (2, groups, channels), both of them in units, above the least unit;
    ranges: float32 (2, n), the unit and the least unit of 32 groups each.
    """

    bounds: Any
    ranges: Any


def store(core: jax.Array, core_dtype: str | None) -> Stored:
    """Store a core of any shape whose last axis is its channel.

    In low bits each value is a step between the bounds of its group, at most 32 neighbouring values
    of a channel, rounded to nearest or stochastically: up with the probability that leaves the mean
    right. The bounds are 8 bits each, whole units of the range that 32 groups have: together .56
    bits a value. Zero is a whole unit, so that zeros alone stay zeros.
    """
    if core_dtype is None:
        return Stored(core)
    if core_dtype == "bfloat16":
        return Stored(core.astype(jnp.bfloat16))
    columns = _in_groups(jnp.clip(core.astype(jnp.float32), -_MOST, _MOST))
    low, high = columns.min(1), columns.max(1)
    groups = _in_ranges(low, high)
    bits, _, rounding = core_dtype.partition("_")
    noise = _noise(columns) if rounding else 0.0
    values = _values(columns, *_ends(groups), _STEPS[bits], noise)
    if bits == "int4":
        return Stored(_pack4(values, core.size), groups)
    return Stored(values.reshape(-1)[: core.size].reshape(core.shape), groups)


def load(stored: Stored, core_dtype: str | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The core of that shape and dtype, as it was stored."""
    if stored.groups is None:
        return stored.data.astype(dtype)
    size, bits = math.prod(shape), str(core_dtype).partition("_")[0]
    groups = stored.groups.bounds.shape[1]
    columns = _unpack4(stored.data, groups) if bits == "int4" else _in_groups(stored.data)
    least, greatest = _ends(stored.groups)
    columns = columns.astype(jnp.float32)
    between = least[:, None] + columns * ((greatest - least) / _STEPS[bits])[:, None]
    # exact at both ends: beside the -1e9 of a mask, rounding would make of 0 another number
    columns = jnp.where(columns == _STEPS[bits], greatest[:, None], between)
    most = float(jnp.finfo(dtype).max)
    if most < _MOST:  # float16, of which a bound may be rounded outwards
        columns = jnp.clip(columns, -most, most)
    return columns.reshape(-1)[:size].reshape(shape).astype(dtype)


def _in_groups(core: jax.Array) -> jax.Array:
    """(groups, values, channels): an even number of neighbouring values of one channel.

    The last are filled up. Of a core with few values a channel, neighbouring channels.
    """
    channels = core.shape[-1] if core.ndim else 1
    channels = channels if core.size >= _FEW * max(channels, 1) else 1
    columns = core.reshape(core.size // channels, channels)
    n = -(-len(columns) // _GROUP)
    each = 2 * -(-len(columns) // (2 * n)) if n else 2
    filled = jnp.pad(columns, ((0, n * each - len(columns)), (0, 0)), mode="edge")
    return filled.reshape(n, each, channels)


def _in_ranges(low: jax.Array, high: jax.Array) -> Groups:
    """The groups of these ends, rounded outwards to whole units of the range that they are in."""
    least, greatest = _rows(low).min(1), _rows(high).max(1)
    unit = (greatest - least) / _UNITS
    unit = jnp.where(unit > 0, unit, jnp.abs(least))  # of values that are all the same
    unit = jnp.where(unit > 0, unit, 1.0)
    ranges = jnp.stack([unit, jnp.floor(least / unit)])
    unit, least = _each(ranges, low.shape)
    bounds = jnp.stack([jnp.floor(low / unit), jnp.ceil(high / unit)]) - least
    return Groups(jnp.clip(bounds, 0, 255).astype(jnp.uint8), ranges)


def _rows(ends: jax.Array) -> jax.Array:
    flat = ends.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % _RANGE), mode="edge").reshape(-1, _RANGE)


def _each(ranges: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The range that each group is in: (2, *shape)."""
    return jnp.repeat(ranges, _RANGE, 1)[:, : math.prod(shape)].reshape(2, *shape)


def _ends(groups: Groups) -> tuple[jax.Array, jax.Array]:
    """(least, greatest) of each group: (groups, channels)."""
    unit, least = _each(groups.ranges, groups.bounds.shape[1:])
    low, high = groups.bounds.astype(jnp.float32)
    return (least + low) * unit, (least + high) * unit


def _values(
    columns: jax.Array, least: jax.Array, greatest: jax.Array, steps: int, noise: jax.Array | float
) -> jax.Array:
    """The nearest of the steps between a group's bounds: uint8, (groups, values, channels)."""
    width = greatest - least
    step = jnp.where(width > 0, width / steps, 1.0)
    # quotients of the groups: XLA would work out `least` anew for each value
    places = columns * (1 / step)[:, None] - (least / step)[:, None]
    return jnp.clip(jnp.round(places + noise), 0, steps).astype(jnp.uint8)


def _noise(columns: jax.Array) -> jax.Array:
    """Of each value from -1/2 to 1/2, uniform.

    Drawn from the values' own bits, so that a step needs no key and repeats itself: counted on from
    their sum and mixed as 32 bits are at the end of MurmurHash3. On a CPU jax.random would take
    longer than all the rest of storing.
    """
    bits = jax.lax.bitcast_convert_type(columns, jnp.uint32).reshape(-1)
    mixed = bits.sum(dtype=jnp.uint32) + jnp.arange(bits.size, dtype=jnp.uint32) * np.uint32(_ODD)
    for shift, odd in _MIX:
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(odd)
    mixed ^= mixed >> np.uint32(16)
    return (mixed.reshape(columns.shape) >> np.uint32(8)).astype(jnp.float32) / 2**24 - 0.5


def _pack4(values: jax.Array, size: int) -> jax.Array:
    """(pairs, channels), the pairs that only fill up a group left out.

    Neighbouring rows make a pair, so that all is done along the channels: of a flat array, XLA on a
    CPU works out the group of each value anew.
    """
    pairs = values.reshape(-1, 2, values.shape[-1])
    packed = pairs[:, 0] | (pairs[:, 1] << np.uint8(4))
    return packed[: -(-size // (2 * values.shape[-1]))]


def _unpack4(packed: jax.Array, groups: int) -> jax.Array:
    """(groups, values, channels); of what was left out, anything."""
    pairs, channels = packed.shape
    each = -(-pairs // groups) if groups else 1
    packed = jnp.pad(packed, ((0, groups * each - pairs), (0, 0)))
    values = jnp.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)
    return values.reshape(groups, 2 * each, channels)
