"""Gradient projection: each gradient loses the directions that earlier tasks need.

Gradient projection memory (Saha et al. 2021, arXiv 2103.09762) takes the protected directions P out
of each gradient, dW - P (P^T dW), and holds P while it trains; scaled (Saha and Roy 2023, arXiv
2302.01386) it takes each out by its importance. Biases and norms are frozen after the first task.
`gpm_int4` keeps every layer's input in int4 on top, which is all of LANCE's memory but the bases.
"""

import functools
from typing import Any

from lance_jax import continual
from lance_jax.continual_config import threshold
from lance_jax.continual_methods.method import Memory, Method, Plan, Setting, nbytes, weights_alone
from lance_jax.factors import Factors, LayerFactors
from lance_jax.slices import Slices


def slices_of(memory: Memory) -> Slices | None:
    """The slices of the tasks so far; None before the first was learnt."""
    return Slices.from_dict(memory["slices"]) if memory else None


def select(setting: Setting) -> list[str]:
    """The layers that have slices, for `protect` and `allocate`."""
    return [f"^{path}$" for path in setting.layers]


def protect(setting: Setting, rule: str = "total") -> tuple[Any, Memory]:
    """After a task: one more slice of each layer."""
    slices = continual.protect(
        slices_of(setting.memory),
        setting.apply_fn,
        setting.params,
        setting.batches(),
        select=select(setting),
        threshold=threshold(setting.config, setting.task),
        rule=rule,
    )
    return setting.params, {"slices": slices.as_dict()}


def storage(memory: Memory) -> dict[str, int]:
    """The slices rest there between tasks."""
    return {"slices": nbytes({path: of["bases"] for path, of in memory["slices"].items()})}


def storage_scaled(memory: Memory) -> dict[str, int]:
    """The slices, and by how much each task needs them."""
    return {"slices": nbytes(memory["slices"])}


def inputs_in(setting: Setting, core_dtype: str | None) -> Factors:
    """Factors by which all layers keep their inputs in `core_dtype`."""
    return Factors(
        {path: LayerFactors({}, core_dtype=core_dtype) for path in (*setting.layers, "head/kernel")}
    )


def _plan(setting: Setting, scaled: bool = False, core_dtype: str | None = None) -> Plan:
    transform = continual.project_out(
        slices_of(setting.memory),
        setting.apply_fn,
        setting.params,
        setting.pictures.read([0]),
        scale=setting.config.scale if scaled else None,
    )
    return Plan(
        trainable=weights_alone(setting),
        calibrate=None if core_dtype is None else lambda: inputs_in(setting, core_dtype),
        transform=transform,
        ram={"projectors": nbytes(transform.init(setting.params))},
    )


gpm = Method(_plan, protect, storage=storage)
gpm_int4 = Method(functools.partial(_plan, core_dtype="int4"), protect, storage=storage)
sgp = Method(functools.partial(_plan, scaled=True), protect, storage=storage_scaled)
