"""LANCE: each gradient is confined to directions that were found orthogonal to what is protected.

arXiv 2509.21617, section 4. While it trains, a layer holds these directions alone, and of its
input what is cheapest in low precision; no slice. Biases and norms are frozen after the first task.
`lance_scaled` lets protected directions in by their importance, as scaled gradient projection does.
`lance_authors` counts energies as the published code does.
"""

import functools

from lance_jax import continual
from lance_jax.continual_methods.method import Method, Plan, Setting, weights_alone
from lance_jax.continual_methods.projection import (
    inputs_in,
    protect,
    select,
    slices_of,
    storage,
    storage_scaled,
)
from lance_jax.factors import Factors


def _plan(setting: Setting, scaled: bool = False, rule: str = "residual") -> Plan:
    config, core_dtype = setting.config, setting.config.core_dtype or None

    def calibrate() -> Factors:
        whole = inputs_in(setting, core_dtype)
        if setting.task == 0:  # nothing is protected: all directions are free
            return whole
        factors = continual.allocate(
            slices_of(setting.memory),
            setting.apply_fn,
            setting.params,
            setting.batches(),
            select=select(setting),
            energy=config.energy,
            scale=config.scale if scaled else None,
            rule=rule,
            core_dtype=core_dtype,
        )
        return Factors({**whole, **factors})

    return Plan(trainable=weights_alone(setting), calibrate=calibrate)


lance = Method(_plan, protect, storage=storage)
lance_scaled = Method(functools.partial(_plan, scaled=True), protect, storage=storage_scaled)
lance_authors = Method(
    functools.partial(_plan, rule="authors"),
    functools.partial(protect, rule="authors"),
    storage=storage,
)
