"""How a core is stored: as it is, in bfloat16, or in 8 or 4 bits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_LEVELS = {"int8": 127, "int4": 7}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored core.

    data: the core itself, int8 values of its shape, or uint8 bytes of two 4-bit values each;
    scale: float32 (channels,), one for each index of the core's last axis, None if not quantised.
    """

    data: Any
    scale: Any = None


def store(core: jax.Array, core_dtype: str | None) -> Stored:
    """Store a core of any shape whose last axis is its channel.

    Low bits are symmetric and rounded to nearest, with one scale for each core channel over the
    whole batch: scale = max |core| / 127 (int8) or / 7 (int4); a channel of zeros has scale 1.
    """
    if core_dtype is None:
        return Stored(core)
    if core_dtype == "bfloat16":
        return Stored(core.astype(jnp.bfloat16))
    core = core.astype(jnp.float32)
    levels = _LEVELS[core_dtype]
    scale = jnp.max(jnp.abs(core), axis=tuple(range(core.ndim - 1)), initial=0.0) / levels
    scale = jnp.where(scale > 0, scale, 1.0)
    values = jnp.clip(jnp.round(core / scale), -levels, levels).astype(jnp.int8)
    return Stored(values if core_dtype == "int8" else _pack4(values), scale)


def load(stored: Stored, core_dtype: str | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The core of that shape and dtype, as it was stored."""
    if core_dtype in _LEVELS:
        values = stored.data if core_dtype == "int8" else _unpack4(stored.data, shape)
        return (values.astype(jnp.float32) * stored.scale).astype(dtype)
    return stored.data.astype(dtype)


def _pack4(values: jax.Array) -> jax.Array:
    flat = values.reshape(-1)
    # The two halves side by side, not neighbours: slices of a flat array are contiguous.
    half = -(-flat.size // 2)
    flat = jnp.pad(flat, (0, 2 * half - flat.size)).astype(jnp.uint8)
    return (flat[:half] & np.uint8(15)) | (flat[half:] << np.uint8(4))


def _unpack4(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    low = (signed << np.int8(4)) >> np.int8(4)  # an arithmetic shift brings the sign back
    high = signed >> np.int8(4)
    return jnp.concatenate([low, high])[: int(np.prod(shape))].reshape(shape)
