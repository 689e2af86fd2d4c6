"""Checkpoints of a whole run with Orbax: each is complete or absent, whenever the process dies."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lance_jax.factors import Factors, LayerFactors, Skipped
from lance_jax.paths import leaves_with_path


class Checkpoint(NamedTuple):
    """What a run needs to go on as if it had never stopped."""

    step: int  # optimiser steps done
    state: Any  # pytree of arrays: parameters, optimiser state, PRNG key data
    factors: Factors
    info: dict[str, Any]  # JSON: loader position, configuration, measured times
    memory: dict[str, Any] = {}  # nested dicts of host arrays whose shapes no one else knows


class Checkpoints:
    """The checkpoints of one run under `directory`; the newest two are kept.

    A context manager. Orbax writes a checkpoint to a temporary directory and renames it at the end,
    so `latest` never sees half of one.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, and returns when it is on disk."""
        step, state, factors, info, memory = checkpoint
        arrays = {"state": state, "factors": _as_dicts(factors), "memory": memory}
        described = {"factors": _describe(factors), "memory": _describe_arrays(memory)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(jax.device_get(arrays)),
                info=ocp.args.JsonSave({"info": info, **described}),
            ),
        )

    def latest(self, state: Any) -> Checkpoint | None:
        """The newest checkpoint, its arrays in the structure of `state`; None where there is none.

        `state` gives the structure, shapes and dtypes. ValueError where it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            return self._restore(step, state)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"checkpoint {str(self._directory / str(step))!r} cannot be read "
                f"({type(error).__name__}: {reason}); if it is damaged, remove it, to go on from "
                "the one before or anew"
            ) from error

    def _restore(self, step: int, state: Any) -> Checkpoint:
        json = self._manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
        described = json["info"]["factors"]
        template = {
            "state": jax.device_get(state),
            "factors": _template(described),
            "memory": _zeros(json["info"]["memory"]),
        }
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(template))
        )
        saved = restored["arrays"]
        for (path, found), (_, wanted) in zip(
            leaves_with_path(saved), leaves_with_path(template), strict=True
        ):
            if found.shape != wanted.shape:
                raise ValueError(f"{path} has shape {found.shape}, not {wanted.shape}")
        state, factors = jax.tree.map(jnp.asarray, (saved["state"], saved["factors"]))
        memory = jax.tree.map(np.asarray, saved["memory"])
        return Checkpoint(step, state, _rebuild(described, factors), json["info"]["info"], memory)


def _describe_arrays(memory: dict[str, Any]) -> Any:
    """Dtypes and shapes of nested dicts of arrays, as JSON."""
    if isinstance(memory, dict):
        return {name: _describe_arrays(part) for name, part in memory.items()}
    return [str(memory.dtype), list(memory.shape)]


def _zeros(described: Any) -> Any:
    """Zeros in the form of what `_describe_arrays` described."""
    if isinstance(described, dict):
        return {name: _zeros(part) for name, part in described.items()}
    return np.zeros(described[1], described[0])


def _as_dicts(factors: Factors) -> dict[str, Any]:
    """The arrays of `factors`, as Orbax likes them."""
    return {
        path: {"bases": dict(f.bases), "mean": f.mean, "update": f.update}
        for path, f in factors.items()
    }


def _describe(factors: Factors) -> dict[str, Any]:
    """All of `factors` but the values, as JSON."""

    def array(a: Any) -> list[Any] | None:
        return None if a is None else [str(a.dtype), list(a.shape)]

    layers = [
        {
            "path": path,
            "bases": [[mode, array(basis)] for mode, basis in f.bases.items()],
            "mean": array(f.mean),
            "update": array(f.update),
            "core_dtype": f.core_dtype,
            "update_core": f.update_core,
            "frozen": f.frozen,
        }
        for path, f in factors.items()
    ]
    return {"layers": layers, "skipped": [list(skipped) for skipped in factors.skipped]}


def _template(described: dict[str, Any]) -> dict[str, Any]:
    """Zeros in the form of `_as_dicts`."""

    def zeros(a: list[Any] | None) -> Any:
        return None if a is None else jnp.zeros(a[1], a[0])

    return {
        layer["path"]: {
            "bases": {mode: zeros(basis) for mode, basis in layer["bases"]},
            "mean": zeros(layer["mean"]),
            "update": zeros(layer["update"]),
        }
        for layer in described["layers"]
    }


def _rebuild(described: dict[str, Any], arrays: dict[str, Any]) -> Factors:
    """The inverse of `_describe`, with the values of `arrays`."""
    layers = {}
    for layer in described["layers"]:
        saved = arrays[layer["path"]]
        bases = {mode: saved["bases"][mode] for mode, _ in layer["bases"]}
        layers[layer["path"]] = LayerFactors(
            bases,
            saved["mean"],
            layer["core_dtype"],
            update=saved["update"],
            update_core=layer["update_core"],
            frozen=layer["frozen"],
        )
    return Factors(layers, tuple(Skipped(*skip) for skip in described["skipped"]))
