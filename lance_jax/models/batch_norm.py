"""Batch norm that keeps one array of its input's size for the backward pass."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # of the running averages: torch's 0.1

Residuals = tuple[jax.Array, jax.Array, jax.Array]


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last; parameters and statistics as in `flax.linen`.

    With ``use_running_average`` it is `flax.linen.BatchNorm`, operation by operation. Without, the
    batch's own mean and variance are used, the running averages follow them, and what is kept for
    the backward pass is the normalised input alone. (Differentiated as it is written, batch norm
    keeps three arrays of that size.)
    """

    use_running_average: bool
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        if self.use_running_average:
            factor = jax.lax.rsqrt(var.value + self.epsilon) * scale
            return (x - mean.value) * factor + bias
        y, *moments = normalised(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for average, moment in zip((mean, var), moments, strict=True):
                new = jax.lax.stop_gradient(moment)
                average.value = MOMENTUM * average.value + (1 - MOMENTUM) * new
        return y


def normalised(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (..., c) normalised by its own moments, and these: mean and (biased) variance (c,).

    No gradient flows through the moments that are returned (Ioffe and Szegedy 2015, arXiv
    1502.03167, section 3, has the gradients of x, scale and bias).
    """
    return _normalised(epsilon, x, scale, bias)


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.mean(jnp.square(x - mean), axes)


def _forward(
    epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Residuals]:
    mean, var = _moments(x)
    inverse = jax.lax.rsqrt(var + epsilon)
    unit = (x - mean) * inverse
    return (unit * scale + bias, mean, var), (unit, inverse, scale)


def _backward(epsilon: float, kept: Residuals, cotangents: Any) -> tuple[jax.Array, ...]:
    unit, inverse, scale = kept
    dy, axes = cotangents[0], tuple(range(unit.ndim - 1))
    dbias, dscale = jnp.sum(dy, axes), jnp.sum(dy * unit, axes)
    n = jnp.asarray(unit.size // unit.shape[-1], unit.dtype)
    return scale * inverse * (dy - dbias / n - unit * (dscale / n)), dscale, dbias


_normalised = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(0,))
_normalised.defvjp(_forward, _backward)
