"""Calibration: frozen factors from the layer inputs of a few batches, forward only."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lance_jax import hosvd, jaxprs
from lance_jax.block_rule import Block, axis_of
from lance_jax.factors import Factors, LayerFactors, Skipped, check_core_dtype
from lance_jax.grams import COUNT, SUM, sum_grams
from lance_jax.layers import Found, Layer, Layers, Use, find
from lance_jax.modes import accumulator
from lance_jax.paths import matching

_ENERGY, _PAPER_ENERGY = 0.9, 0.7
# The share of a Gram matrix's trace that float32 sums cannot tell from nothing.
_CANCELLED = 1e-5


class Last:
    """See `last`."""

    def __init__(self, n: int):
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"last({n!r}): the number of layers must be an integer of at least 1")
        self.n = n

    def __repr__(self) -> str:
        return f"last({self.n})"

    def __call__(self, found: Layers) -> list[Layer]:
        outermost = [layer for layer in found if layer.block is None]
        body = [layer for layer in outermost[:-1] if not layer.depthwise]
        if len(body) < self.n:
            raise ValueError(
                f"last({self.n}) asks for more layers than the {len(body)} that are neither "
                "depthwise nor the head"
            )
        return body[-self.n :]


Select = str | Sequence[str] | Callable[[Layer], bool] | Last | None


def last(n: int) -> Last:
    """A `select`: the last n layers that are neither depthwise nor the head (the last of all).

    Where there are blocks, each counts as one, and the layers inside of it do not count.
    """
    return Last(n)


def calibrate(
    apply_fn: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    select: Select = None,
    energy: float = _ENERGY,
    modes: str | Sequence[str] | None = None,
    center: bool = False,
    core_dtype: str | None = None,
) -> Factors:
    """Frozen factors for `compress`, from the layer inputs of a few batches, forward only.

    One-shot HOSVD (LANCE, arXiv 2509.21617, section 3): the Gram matrices X_(m) X_(m)^T of the
    chosen modes are summed over all batches, every sample with equal weight, and each mode keeps
    its fewest leading eigenvectors that reach `energy`. Memory does not grow with the number of
    batches; there is one compilation for each batch shape.

    A mode wider than 4096 (the patches of 512 channels) has a sketch of 1024 columns instead of its
    Gram matrix (`hosvd`). The share that its directions hold is known from below, so that there are
    never too few; a slowly falling spectrum may get twice as many as it needs, or need more than
    1024 where some hundreds would do.

    Args:
      apply_fn: any JAX function of (params, *args).
      params: a pytree of parameters.
      batches: the remaining arguments of each call: tuples, or lone arrays. A short last batch
        is welcome.
      select: which layers and blocks: None (all blocks that stand in no other, and all layers that
        stand in none), a regular expression or several over paths (`re.search`; one that is found
        in a block's name chooses none of the layers inside), `last(n)`, or a function of a
        `Layer`.
      energy: the share of the trace that each mode keeps, in (0, 1]; 0.9 where none is given. Of
        blocks, whose errors add up, take it near 1, or `modes=()`.
      modes: None (all but batch and patch), "paper" (all axes, at energy 0.7), or mode names, each
        applied where a layer has it, and to all activations that enter a block, or to that of its
        number ("0.feature"); () keeps the whole input of the selected layers in `core_dtype`.
      center: whether to keep the inputs' mean apart (see `LayerFactors`); not of blocks.
      core_dtype: how cores are stored, as in `LayerFactors`.

    Returns:
      `Factors`; float32 bases (float64 for float64 inputs), stacked over scan steps for a scanned
      layer at one common rank. Selected layers without a basis are listed in `.skipped`.

    Raises:
      ValueError: for bad arguments, no batches, nothing selected, inputs of a layer that are all
        zero or not finite (with `modes=()` they are not looked at), or a mode wider than 4096 that
        needs more than 1024 directions.
    """
    modes = tuple(modes) if isinstance(modes, Iterable) and not isinstance(modes, str) else modes
    energy = _energy(energy, modes)
    _check_modes_and_dtype(modes, core_dtype)
    first, rest = first_batch(batches)
    found = find(jaxprs.trace(apply_fn, params, *first))
    chosen = selected(select, found.layers)
    by_path, skipped = _choose_modes(chosen, found, modes, center)
    wanted = {path: (*m, *((SUM, COUNT) if center else ())) for path, m in by_path.items()}
    total = sum_grams(apply_fn, params, itertools.chain([first], rest), wanted)
    layers = {}
    for path, sums in total.items():
        use = found.uses[path][0]
        _check_finite(path, sums)
        mean = None
        if center:
            sums, mean = _centred(path, sums, use)
        bases = {
            m: jnp.asarray(_basis(path, m, one, energy), accumulator(use.x_of(m).dtype))
            for m, one in sums.items()
        }
        layers[path] = LayerFactors(bases, mean, core_dtype)
    return Factors(layers, skipped)


# --- arguments -----------------------------------------------------------------------------------


def _energy(energy: float, modes: Any) -> float:
    hosvd.check_energy(energy)
    if not (isinstance(modes, str) and modes == "paper"):
        return energy
    if energy not in (_ENERGY, _PAPER_ENERGY):
        raise ValueError(
            f"energy is {energy!r}, but modes='paper' stands for energy {_PAPER_ENERGY}; "
            "name the modes to choose another"
        )
    return _PAPER_ENERGY


def _check_modes_and_dtype(modes: Any, core_dtype: Any) -> None:
    check_core_dtype(core_dtype)
    if modes not in (None, "paper") and not isinstance(modes, tuple):
        raise ValueError(f"modes is {modes!r}; it must be None, 'paper' or a tuple of mode names")


def first_batch(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterator[Any]]:
    if not isinstance(batches, Iterable) or jaxprs.is_array(batches):
        kind = type(batches).__name__
        raise ValueError(f"batches is a {kind}; it must be an iterable of batches, such as a list")
    rest = map(_as_tuple, batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty; calibration needs at least one")
    return first, rest


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def selected(select: Select, found: Layers) -> list[Layer]:
    paths = ", ".join(layer.path for layer in found) or "none"
    if select is None:
        chosen = [layer for layer in found if layer.block is None]
    elif isinstance(select, Last):
        chosen = select(found)
    elif callable(select):
        chosen = [layer for layer in found if select(layer)]
    else:
        matching(select, [layer.path for layer in found], "select", "layer", found.skipped)
        patterns = [select] if isinstance(select, str) else select
        hits = set().union(*(_hits(pattern, found) for pattern in patterns))
        chosen = [layer for layer in found if layer.path in hits]
    if not chosen:
        raise ValueError(f"select is {select!r}: it selects no layer; there are {paths}")
    return chosen


def _hits(pattern: str, found: Layers) -> set[str]:
    """The paths in which a pattern is found, without those inside of a block that it names too."""
    around = {layer.path: layer.block for layer in found}
    hits = {path for path in around if re.search(pattern, path)}

    def is_inside(path: str) -> bool:
        block = around.get(path)
        return block is not None and (block in hits or is_inside(block))

    return {path for path in hits if not is_inside(path)}


def _choose_modes(
    chosen: list[Layer], found: Found, modes: Any, center: bool
) -> tuple[dict[str, tuple[str, ...]], tuple[Skipped, ...]]:
    """The modes of each selected layer, and the layers left without any."""
    if modes is not None and not isinstance(modes, str):
        all_modes = [mode for layer in chosen for mode in layer.modes]
        known = list(dict.fromkeys([*map(axis_of, all_modes), *all_modes]))
        for mode in modes:
            if mode not in known:
                raise ValueError(
                    f"mode {mode!r} is in no selected layer; they have {', '.join(known)}"
                )
    by_path, skipped = {}, []
    for layer in chosen:
        product = found.uses[layer.path][0].product
        named = {None: product.default_modes, "paper": product.paper_modes}
        asked = set(named[modes] if isinstance(modes, str | None) else modes)
        names = tuple(
            mode
            for mode in layer.modes
            if asked & {mode, axis_of(mode)} and not _is_whole(product, mode)
        )
        if "patch" in names and set(names) - {"patch", "batch"}:
            raise ValueError(
                f"modes {names} of {layer.path!r}: patch goes with batch alone, since it holds "
                "the channel and spatial modes already"
            )
        if center and "batch" in names:
            raise ValueError(f"center does not go with the batch mode of {layer.path!r}")
        if center and not _can_center(found.uses[layer.path]):
            why = "a block" if layer.kind == "block" else "without one batch axis it"
            skipped.append(Skipped(layer.path, f"{why} has no mean"))
        elif names or modes == () or layer.kind == "block":
            by_path[layer.path] = names
        else:
            skipped.append(Skipped(layer.path, "it has none of the modes asked for"))
    return by_path, tuple(skipped)


def _is_whole(product: Any, mode: str) -> bool:
    """Whether it is the mode of an activation that has no basis."""
    return isinstance(product, Block) and product.place(mode)[0] in product.whole


def _can_center(uses: list[Use]) -> bool:
    if not all(map(_has_batch, uses)):
        return False
    return len({(use.product.x_shape, use.of_product().batch_axis) for use in uses}) == 1


def _has_batch(use: Use) -> bool:
    return not isinstance(use.product, Block) and "batch" in use.product.modes


# --- factors -------------------------------------------------------------------------------------


def _centred(
    path: str, sums: dict[str, np.ndarray], use: Use
) -> tuple[dict[str, np.ndarray], jax.Array]:
    """(Gram matrices about the mean, the mean): sum (x-m)(x-m)^T = sum x x^T - N m m^T."""
    sums = dict(sums)
    total, count = sums.pop(SUM), sums.pop(COUNT)

    def each(like):
        return count.reshape(*count.shape, *(1,) * (like.ndim - count.ndim))

    mean = jnp.asarray(total / each(total))
    product = use.of_product()
    for mode, value in sums.items():

        def of_mean(m, mode=mode):
            return product.gram(jnp.expand_dims(m, product.batch_axis), mode)

        for _ in use.stack:
            of_mean = jax.vmap(of_mean)
        share = np.asarray(of_mean(mean), np.float64)
        sums[mode] = value - share * each(value)
        if hosvd.trace(sums[mode]).sum() <= _CANCELLED * hosvd.trace(value).sum():
            raise ValueError(
                f"the input of {path!r} is the same in all samples: nothing is left to project "
                "once it is centred"
            )
    return sums, mean.astype(accumulator(use.x.dtype))


def _check_finite(path: str, sums: dict[str, np.ndarray]) -> None:
    for mode, total in sums.items():
        number = mode.rpartition(".")[0]
        which = f"activation {number} that enters" if number else "the input of"
        if not np.isfinite(total).all():
            raise ValueError(
                f"{which} {path!r} holds NaN or Inf, or values whose squares are Inf, in the "
                "calibration batches"
            )
        if mode != SUM and not total.any():
            raise ValueError(f"{which} {path!r} is all zero in the calibration batches")


def _basis(path: str, mode: str, total: np.ndarray, energy: float) -> np.ndarray:
    """Bases (..., n, r) of stacked Gram matrices or sketches, at the largest rank any needs."""
    stack = total.reshape(-1, *total.shape[-2:])
    pairs = [hosvd.decompose(one) for one in stack]
    # A layer or group of zeros among others that are not has no direction of its own to keep.
    r = max(hosvd.rank(values, energy) for values, _ in pairs if values.any())
    n, most = pairs[0][1].shape
    if r > most:
        reached = min(1 - values[-1] / values.sum() for values, _ in pairs if values.any())
        raise ValueError(
            f"energy is {energy}, but the {mode} mode of {path!r}, {n} wide, reaches "
            f"{np.floor(reached * 1000) / 1000} with the {most} directions that are sought in a "
            "mode so wide; ask for less, or for other modes"
        )
    bases = np.stack([vectors[:, :r] for _, vectors in pairs])
    return bases.reshape(*total.shape[:-1], r)
