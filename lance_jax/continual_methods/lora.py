"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the network of the first task.

The first task trains all parameters. Later ones train a change A B of each kernel, A (D, r) and
B (r, out) for a kernel of D = height * width * channels rows, and their head; all else is frozen.

* `lora_per_task`: adapters of one rank for each task (as CoLoR, Wistuba et al. 2023, arXiv
  2311.17601, where the task is known); nothing is forgotten, and each task is stored;
* `lora_shared`: the same adapters for all tasks (as CLoRA, Muralidhara et al. 2025, arXiv
  2507.19887);
* `lora_dynamic`: as `lora_per_task`, the rank of each layer from how the kernel changes in one
  epoch of plain training (after PEARL, Bhat et al. 2025, arXiv 2505.11998, which compares the
  distance to reference weights). That epoch trains all kernels, and its memory is not counted.

A kernel with its adapter is one more array that is kept for the backward pass.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lance_jax import hosvd
from lance_jax.continual_methods.method import (
    ApplyFn,
    Memory,
    Method,
    Plan,
    Setting,
    nbytes,
    weights_alone,
)
from lance_jax.paths import leaves_with_path

ADAPTERS = "adapters"  # the entry of the params that are trained
PROBE_EPOCHS = 1
Adapters = Mapping[str, Any]  # path of a kernel -> {"a": A, "b": B}


def new_adapters(params: Any, ranks: Mapping[str, int], key: jax.Array) -> dict[str, Any]:
    """Adapters that change nothing yet: A is random, as a kernel begins, and B zero."""
    adapters = {}
    for i, (path, rank) in enumerate(ranks.items()):
        d, out = _matrix(params, path).shape
        a = jax.random.normal(jax.random.fold_in(key, i), (d, rank)) / np.sqrt(d)
        adapters[path] = {"a": a, "b": jnp.zeros((rank, out))}
    return adapters


def adapted(params: Any, adapters: Adapters) -> Any:
    """The params with A B added to each kernel."""

    def add(place: Any, kernel: jax.Array) -> jax.Array:
        part = adapters.get(jax.tree_util.keystr(place, simple=True, separator="/"))
        if part is None:
            return kernel
        return kernel + (jnp.asarray(part["a"]) @ part["b"]).reshape(kernel.shape)

    return jax.tree_util.tree_map_with_path(add, params)


def wrap(apply_fn: ApplyFn) -> ApplyFn:
    """An apply_fn of params that hold adapters."""

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        rest = {name: part for name, part in params.items() if name != ADAPTERS}
        return apply_fn(adapted(rest, params[ADAPTERS]), *args, **kwargs)

    return apply


def _matrix(params: Any, path: str) -> jax.Array:
    """A kernel as (D, out)."""
    kernel = dict(leaves_with_path(params))[path]
    return kernel.reshape(-1, kernel.shape[-1])


# --- ranks ----------------------------------------------------------------------------------------


def _fixed(setting: Setting) -> dict[str, int]:
    most = {path: min(_matrix(setting.params, path).shape) for path in setting.layers}
    return {path: min(setting.config.lora_rank, rank) for path, rank in most.items()}


def _by_change(setting: Setting) -> dict[str, int]:
    """The rank that holds `config.lora_energy` of each kernel's change in a short training."""
    probe = Plan(trainable=weights_alone(setting))
    after = setting.train(probe, f"task_{setting.task}_probe", PROBE_EPOCHS)
    ranks = {}
    for path in setting.layers:
        change = _matrix(after, path) - _matrix(setting.params, path)
        values = np.linalg.svd(np.asarray(change, np.float64), compute_uv=False) ** 2
        ranks[path] = hosvd.rank(values, setting.config.lora_energy) if values.any() else 1
    return ranks


# --- before and after a task ----------------------------------------------------------------------


def _plan(setting: Setting, shared: bool = False, ranks: Any = _fixed) -> Plan:
    if setting.task == 0:
        return Plan()
    adapters = setting.memory.get("all") if shared else None
    if adapters is None:
        key = jax.random.fold_in(jax.random.key(setting.config.seed), setting.task)
        adapters = new_adapters(setting.params, ranks(setting), key)
    adapters = jax.tree.map(jnp.asarray, adapters)
    return Plan(
        trainable=["^head/", f"^{ADAPTERS}/"],
        params={**setting.params, ADAPTERS: adapters},
        wrap=wrap,
        ram={"adapters": nbytes(adapters)},
    )


def _learned(setting: Setting, shared: bool = False) -> tuple[Any, Memory]:
    rest = {name: part for name, part in setting.params.items() if name != ADAPTERS}
    if setting.task == 0:
        return rest, {}
    place = "all" if shared else str(setting.task)
    return rest, {**setting.memory, place: jax.device_get(setting.params[ADAPTERS])}


def _params_of(params: Any, memory: Memory, task: int, shared: bool = False) -> Any:
    return adapted(params, memory.get("all" if shared else str(task), {}))


def _storage(memory: Memory) -> dict[str, int]:
    return {"adapters": nbytes(memory)}


lora_per_task = Method(_plan, _learned, _params_of, _storage)
lora_shared = Method(
    functools.partial(_plan, shared=True),
    functools.partial(_learned, shared=True),
    functools.partial(_params_of, shared=True),
    _storage,
)
lora_dynamic = Method(functools.partial(_plan, ranks=_by_change), _learned, _params_of, _storage)
