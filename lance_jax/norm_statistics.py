"""The statistics of batch norm over many batches, as they are in evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lance_jax.models.batch_norm import MOMENTUM


def norm_statistics(apply_fn: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Any:
    """Means and variances of every batch norm over all batches together: new "batch_stats".

    The running averages that training leaves are not these where there is dropout, which adds to
    the variance that the next layer sees. The moments of batches of one size are put together
    exactly (Wu and Johnson 2021, arXiv 2105.07576, section 3); each batch is normalised by itself.

    Args:
      apply_fn: (params, batch) -> (outputs, {"batch_stats": ...}) of a network that trains its
        statistics, without dropout.
      params: its parameters; the entry "batch_stats" has the statistics' shapes.
      batches: one at least, all of one size.
    """
    zeros = jax.tree.map(jnp.zeros_like, params["batch_stats"])

    @jax.jit
    def moments(params: Any, batch: Any) -> Any:
        _, new = apply_fn({**params, "batch_stats": zeros}, batch)
        found = jax.tree.map(lambda average: average / (1 - MOMENTUM), new["batch_stats"])
        return _each_norm(found, lambda mean, var: (mean, var + mean**2))

    total, count = zeros, 0
    for batch in batches:
        total, count = jax.tree.map(jnp.add, total, moments(params, batch)), count + 1
    means = jax.tree.map(lambda leaf: leaf / count, total)
    return _each_norm(means, lambda mean, square: (mean, jnp.maximum(square - mean**2, 0)))


def _each_norm(statistics: Any, change: Callable[[Any, Any], tuple[Any, Any]]) -> Any:
    """The statistics with (mean, var) of each norm changed."""
    if "mean" not in statistics:
        return {name: _each_norm(part, change) for name, part in statistics.items()}
    mean, var = change(statistics["mean"], statistics["var"])
    return {"mean": mean, "var": var}
