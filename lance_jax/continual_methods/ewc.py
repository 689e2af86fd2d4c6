"""Elastic weight consolidation: a quadratic penalty on leaving old weights, by their importance.

Kirkpatrick et al. 2017, arXiv 1612.00796, in its form with one penalty (Schwarz et al. 2018, arXiv
1805.06370): the loss gains strength / 2 * sum F (w - w*)^2, where w* are the weights after the last
task, and F is the sum over tasks of the squared gradients at their ends, each the mean over samples
(the empirical Fisher information's diagonal).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lance_jax.continual_methods.method import Memory, Method, Plan, Setting, nbytes
from lance_jax.continual_tasks import criterion
from lance_jax.loader import Loader
from lance_jax.paths import leaves_with_path


def penalty(memory: Memory, strength: float) -> optax.GradientTransformation:
    """Adds the penalty's gradient, strength * F (w - w*); the memory is its state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def add(path: Any, gradient: jax.Array, weight: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in state:
                return gradient
            importance, anchor = state[name]["importance"], state[name]["anchor"]
            return gradient + strength * importance * (weight - anchor)

        return jax.tree_util.tree_map_with_path(add, updates, params), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.asarray, memory), update)


def _plan(setting: Setting) -> Plan:
    return Plan(
        transform=penalty(setting.memory, setting.config.ewc_strength),
        ram={"penalty": nbytes(setting.memory)},
    )


def _learned(setting: Setting) -> tuple[Any, Memory]:
    squares = importance(setting)
    memory = {}
    for name, weight in leaves_with_path(setting.params):
        if name in squares:
            before = setting.memory.get(name, {"importance": 0})["importance"]
            memory[name] = {"importance": before + squares[name], "anchor": np.asarray(weight)}
    return setting.params, memory


def importance(setting: Setting) -> dict[str, np.ndarray]:
    """Path -> squared gradient of a sample's loss, mean over the task's training pictures.

    Norms use the statistics of the whole task: those of a batch of one would hide the layers below.
    """
    loss = criterion(setting.config.task_classes)
    rest = {name: part for name, part in setting.params.items() if name == "batch_stats"}
    weights = {name: part for name, part in setting.params.items() if name != "batch_stats"}

    def loss_of_one(weights: Any, picture: jax.Array, label: jax.Array) -> jax.Array:
        return loss(setting.fixed_fn({**weights, **rest}, picture[None]), label[None])

    @jax.jit
    def add(total: Any, pictures: jax.Array, labels: jax.Array) -> Any:
        def one(total: Any, example: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            gradient = jax.grad(loss_of_one)(weights, *example)
            return jax.tree.map(lambda t, g: t + g**2, total, gradient), None

        return jax.lax.scan(one, total, (pictures, labels))[0]

    total, n = jax.tree.map(jnp.zeros_like, weights), 0
    for pictures, labels in _examples(setting):
        total, n = add(total, pictures, labels), n + len(labels)
    return {name: np.asarray(leaf) / n for name, leaf in leaves_with_path(total)}


def _examples(setting: Setting) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch of the task, batch by batch, but for a last short batch."""
    pictures, config = setting.pictures, setting.config
    order = Loader(len(pictures.labels), config.batch_size, config.seed)
    for indices in itertools.islice(order, order.steps_per_epoch):
        yield pictures.read(indices), pictures.labels[indices]


ewc = Method(_plan, _learned, storage=lambda memory: {"penalty": nbytes(memory)})
