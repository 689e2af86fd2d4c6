"""All devices of this machine at work on one batch; a CPU has one for each core.

Devices of one core each run a small network faster than one device of all cores, since its
operations are too short to be worth dividing.
"""

import math
import os
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_cores() -> None:
    """Makes each core of a CPU a device; to be called before JAX computes anything."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def mesh_for(batch_size: int) -> Mesh:
    """As many devices as divide a batch evenly."""
    count = math.gcd(batch_size, jax.device_count())
    devices = jax.devices()[:count]
    return jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


def spread(batch: Any, mesh: Mesh) -> jax.Array:
    """The batch, its first axis divided among the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on each device, as functions of a spread batch need them."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
