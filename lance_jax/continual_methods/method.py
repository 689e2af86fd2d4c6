"""What a method of continual learning is: what it does before and after each task."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax

from lance_jax.config import Config
from lance_jax.factors import Factors
from lance_jax.pictures import Pictures

ApplyFn = Callable[..., Any]
Memory = dict[str, Any]  # nested dicts of host arrays: what is carried from task to task


class Setting(NamedTuple):
    """The task at hand, as a method sees it.

    Attributes:
      config: the settings of the run.
      task: its number, from 0.
      apply_fn: (params, pictures) -> logits, or (logits, new statistics), without dropout; before
        the task as it trains, after it as in the task's evaluation.
      fixed_fn: the same with the statistics that are in the params, whatever the batch.
      params: before the task, or after it.
      layers: paths of all kernels but the head's.
      pictures: what the task trains on.
      batches: gives the task's training pictures, batch by batch, but for a last short batch.
      memory: what `learned` of the task before gave; {} before the first.
      train: trains by another plan, in a folder of that name, for a number of epochs; params after.
    """

    config: Config
    task: int
    apply_fn: ApplyFn
    fixed_fn: ApplyFn
    params: Any
    layers: list[str]
    pictures: Pictures
    batches: Callable[[], Iterator[jax.Array]]
    memory: Memory
    train: Callable[["Plan", str, int], Any]


class Plan(NamedTuple):
    """What training a task takes beyond plain backprop on the task's pictures.

    Attributes:
      trainable: regular expressions of the trained parameters; None: all but the statistics.
      calibrate: gives the factors to compress with; None: plain backprop.
      transform: applied to the gradients before the optimiser.
      pictures: to train on instead of the task's own.
      params: to train instead of the network's own.
      wrap: gives the apply_fn of those params from the network's own.
      ram: bytes held while training, by what they are, beside what is kept for the backward pass
        and the factors.
    """

    trainable: list[str] | None = None
    calibrate: Callable[[], Factors] | None = None
    transform: optax.GradientTransformation | None = None
    pictures: Pictures | None = None
    params: Any = None
    wrap: Callable[[ApplyFn], ApplyFn] = lambda apply_fn: apply_fn
    ram: Mapping[str, int] = {}


def _unchanged(setting: Setting) -> tuple[Any, Memory]:
    return setting.params, setting.memory


def _of_network(params: Any, memory: Memory, task: int) -> Any:
    return params


class Method(NamedTuple):
    """One method.

    Attributes:
      plan: setting -> `Plan`, before a task.
      learned: setting, with the params that the plan trained -> the network's params and the
        memory, after a task.
      params_of: params, memory, task -> the params to evaluate a task with, after it was learnt.
      storage: memory -> bytes that rest in storage between tasks, by what they are.
      mixes: whether a batch holds pictures of several tasks, whose statistics are then common.
      joint: whether all tasks are learnt at once.
    """

    plan: Callable[[Setting], Plan]
    learned: Callable[[Setting], tuple[Any, Memory]] = _unchanged
    params_of: Callable[[Any, Memory, int], Any] = _of_network
    storage: Callable[[Memory], Mapping[str, int]] = lambda memory: {}
    mixes: bool = False
    joint: bool = False


def weights_alone(setting: Setting) -> list[str] | None:
    """All parameters in the first task; then kernels and head: other biases move old outputs."""
    if setting.task == 0:
        return None
    return ["^head/", *(f"^{path}$" for path in setting.layers)]


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
