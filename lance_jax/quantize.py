"""How a core is stored: as it is, in bfloat16, or in 8 or 4 bits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT8 = 127
_INT4 = 15  # steps between the bounds of a group
_GROUP = 28  # neighbouring values of a channel, at most, that share bounds
_FEW = 16  # values of a channel that are too few for a group
_GROUPS = 16  # neighbouring groups that share the range in which their bounds lie
_BOUND = 255


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored core.

    data: the core itself, int8 values of its shape, or uint8 bytes of two 4-bit values each.
    scale: of int8, float32 (channels,), one for each index of the core's last axis; of int4, a
    `Groups`; None if not quantised.
    """

    data: Any
    scale: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """What groups of 4-bit values mean.

    bounds: uint8 (groups, channels, 2), the least and greatest value of each group, in 255ths of
    its range; ranges: float32 (n, 2), least and greatest of 16 groups each.
    """

    bounds: Any
    ranges: Any


def store(core: jax.Array, core_dtype: str | None) -> Stored:
    """Store a core of any shape whose last axis is its channel.

    int8 is symmetric, with one scale for each core channel over the whole batch: max |core| / 127,
    or 1 for a channel of zeros. int4 has bounds for every 28 neighbouring values of a channel, in 8
    bits each: 4.7 bits a value in all. Both round to nearest.
    """
    if core_dtype is None:
        return Stored(core)
    if core_dtype == "bfloat16":
        return Stored(core.astype(jnp.bfloat16))
    core = core.astype(jnp.float32)
    if core_dtype == "int4":
        return _store4(core)
    scale = jnp.max(jnp.abs(core), axis=tuple(range(core.ndim - 1)), initial=0.0) / _INT8
    scale = jnp.where(scale > 0, scale, 1.0)
    return Stored(jnp.clip(jnp.round(core / scale), -_INT8, _INT8).astype(jnp.int8), scale)


def load(stored: Stored, core_dtype: str | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The core of that shape and dtype, as it was stored."""
    if core_dtype == "int4":
        return _load4(stored, shape).astype(dtype)
    if core_dtype == "int8":
        return (stored.data.astype(jnp.float32) * stored.scale).astype(dtype)
    return stored.data.astype(dtype)


# --- 4 bits --------------------------------------------------------------------------------------


def _store4(core: jax.Array) -> Stored:
    groups = _in_groups(core)
    low, high = groups.min(1), groups.max(1)
    ranges = _ranges(low, high)
    bounds = _in_range(low, high, ranges)
    values = _values(groups, *_ends(bounds, ranges))
    return Stored(_pack4(values.reshape(-1)[: core.size]), Groups(bounds, ranges))


def _load4(stored: Stored, shape: tuple[int, ...]) -> jax.Array:
    size = math.prod(shape)
    values = _in_groups(_unpack4(stored.data, size).reshape(shape))
    least, step = _ends(stored.scale.bounds, stored.scale.ranges)
    return _restored(values, least, step).reshape(-1)[:size].reshape(shape)


def _in_groups(core: jax.Array) -> jax.Array:
    """(groups, values, channels): neighbouring values of one channel; the last are filled up.

    Of a core with few values a channel, neighbouring channels.
    """
    channels = core.shape[-1] if core.ndim and core.size >= _FEW * core.shape[-1] else 1
    columns = core.reshape(core.size // max(channels, 1), channels)
    n = -(-len(columns) // _GROUP)
    each = -(-len(columns) // n) if n else 1
    filled = jnp.pad(columns, ((0, n * each - len(columns)), (0, 0)), mode="edge")
    return filled.reshape(n, each, channels)


def _ranges(low: jax.Array, high: jax.Array) -> jax.Array:
    """(n, 2): the ends of neighbouring groups, along a channel and then the next."""
    least, greatest = (_rows(ends.T.reshape(-1)) for ends in (low, high))
    return jnp.stack([least.min(1), greatest.max(1)], 1)


def _rows(flat: jax.Array) -> jax.Array:
    filled = jnp.pad(flat, (0, -len(flat) % _GROUPS), mode="edge")
    return filled.reshape(len(filled) // _GROUPS, _GROUPS)


def _in_range(low: jax.Array, high: jax.Array, ranges: jax.Array) -> jax.Array:
    """uint8 (groups, channels, 2): ends in 255ths of their ranges, rounded outwards."""
    least, step = _steps(ranges, low.shape)
    outwards = jnp.stack([jnp.floor((low - least) / step), jnp.ceil((high - least) / step)], -1)
    return jnp.clip(outwards, 0, _BOUND).astype(jnp.uint8)


def _ends(bounds: jax.Array, ranges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(least, width of a step) of each group's values: (groups, channels)."""
    least, step = _steps(ranges, bounds.shape[:2])
    low, high = jnp.moveaxis(bounds.astype(jnp.float32), -1, 0)
    return least + low * step, (high - low) * step / _INT4


def _steps(ranges: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(least, width of a 255th) of the range that each group is in."""
    count, channels = shape
    each = jnp.repeat(ranges, _GROUPS, 0)[: count * channels].reshape(channels, count, 2)
    least, greatest = jnp.moveaxis(each, (0, 1, 2), (2, 1, 0))
    step = (greatest - least) / _BOUND
    return least, jnp.where(step > 0, step, 1.0)


def _values(groups: jax.Array, least: jax.Array, step: jax.Array) -> jax.Array:
    places = (groups - least[:, None]) / jnp.where(step > 0, step, 1.0)[:, None]
    return jnp.clip(jnp.round(places), 0, _INT4).astype(jnp.uint8)


def _restored(values: jax.Array, least: jax.Array, step: jax.Array) -> jax.Array:
    return least[:, None] + values.astype(jnp.float32) * step[:, None]


def _pack4(flat: jax.Array) -> jax.Array:
    # The two halves side by side, not neighbours: slices of a flat array are contiguous.
    half = -(-flat.size // 2)
    flat = jnp.pad(flat, (0, 2 * half - flat.size))
    return flat[:half] | (flat[half:] << np.uint8(4))


def _unpack4(packed: jax.Array, size: int) -> jax.Array:
    return jnp.concatenate([packed & np.uint8(15), packed >> np.uint8(4)])[:size]
