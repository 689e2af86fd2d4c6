"""All devices of this machine at work on one batch; a CPU has one for each core.

Devices of one core each run a small network faster than one device of all cores, since its
operations are too short to be worth dividing.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_cores() -> None:
    """Makes each core that may be used a device; to be called before JAX computes anything."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", allowed or 1)


def mesh_for(*sizes: int) -> Mesh:
    """As many devices as divide batches of these sizes evenly."""
    common = math.gcd(*sizes)
    count = max(n for n in range(1, jax.device_count() + 1) if common % n == 0)
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


def spread(batch: Any, mesh: Mesh) -> Any:
    """The arrays of a batch, their first axis divided among the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on each device, as functions of a spread batch need them."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divided(value_and_grad: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The same (params, *batch) -> (value, grads), each device taking its part of a spread batch.

    For a loss that is a mean over the batch. `params` are replicated, and so is the result.
    """
    if mesh.size == 1:
        return value_and_grad

    def mean(params: Any, *batch: Any) -> Any:
        return jax.lax.pmean(value_and_grad(params, *batch), "batch")

    @jax.jit
    def step(params: Any, *batch: Any) -> Any:
        specs = (PartitionSpec(), *[PartitionSpec("batch")] * len(batch))
        # what varies over the mesh cannot be told of the rules of custom derivatives
        mapped = jax.shard_map(
            mean, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return mapped(params, *batch)

    return step
