"""LANCE: each gradient is confined to directions that were found orthogonal to what is protected.

arXiv 2509.21617, section 4. While it trains, a layer holds these directions alone, and of its
input what is cheapest in low precision; no slice. Biases and norms are frozen after the first task.
`lance_scaled` lets protected directions in by their importance, as scaled gradient projection does.
`lance_authors` counts energies as the published code does, what is protected included, and has an
energy of its own.

With `config.keep` = "blocks" it holds what enters each block, in low precision, and recomputes the
block from it; the gradients of its layers are confined there all the same.
"""

import functools

import lance_jax
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
from lance_jax.factors import Factors, LayerFactors
from lance_jax.train import STEM, in_blocks


def _plan(setting: Setting, scaled: bool = False, rule: str = "residual") -> Plan:
    config, core_dtype = setting.config, setting.config.core_dtype or None
    energy = config.authors_energy if rule == "authors" else config.energy
    by_block = config.keep == "blocks"

    def calibrate() -> Factors:
        factors = by_layer()
        return of_blocks(setting, factors, core_dtype) if by_block else factors

    def by_layer() -> Factors:
        whole = inputs_in(setting, core_dtype)
        if setting.task == 0:  # nothing is protected: all directions are free
            return whole
        factors = continual.allocate(
            slices_of(setting.memory),
            setting.apply_fn,
            setting.params,
            setting.batches(),
            select=select(setting),
            energy=energy,
            scale=config.scale if scaled else None,
            rule=rule,
            core_dtype=core_dtype,
        )
        return Factors({**whole, **factors})

    plan = Plan(trainable=weights_alone(setting), calibrate=calibrate)
    return plan._replace(wrap=in_blocks) if by_block else plan


def of_blocks(setting: Setting, factors: Factors, core_dtype: str | None) -> Factors:
    """What enters each block, in `core_dtype`; of the layers in it, what they are confined to."""
    apply_fn, pictures = in_blocks(setting.apply_fn), setting.pictures.read([0])
    layers = lance_jax.layers(apply_fn, setting.params, pictures)
    blocks = [layer.path for layer in layers if layer.kind == "block"]
    kept = {path: LayerFactors({}, core_dtype=core_dtype) for path in blocks if path != STEM}
    for path, layer in factors.items():
        if path.startswith(tuple(f"{block}/" for block in blocks)):
            layer = LayerFactors({}, update=layer.update, frozen=layer.frozen)
        kept[path] = layer
    return Factors(kept)


lance = Method(_plan, protect, storage=storage)
lance_scaled = Method(functools.partial(_plan, scaled=True), protect, storage=storage_scaled)
lance_authors = Method(
    functools.partial(_plan, rule="authors"),
    functools.partial(protect, rule="authors"),
    storage=storage,
)
