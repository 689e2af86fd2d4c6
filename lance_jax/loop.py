"""The training loop: two-phase gradients, metrics by windows, checkpoints, exact resumption."""

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.progress import Progress

import lance_jax
from lance_jax import devices, metrics
from lance_jax.checkpoint import Checkpoint, Checkpoints
from lance_jax.config import Config
from lance_jax.features import Features
from lance_jax.loader import Loader, read_ahead
from lance_jax.paths import leaves_with_path
from lance_jax.pictures import Pictures
from lance_jax.step import ValueAndGrad
from lance_jax.timing import least_seconds

MICRO_BATCHES = (4, 16)  # those that are tried beside the whole batch
WARM_UP_STEPS = 3  # of each process, not timed: they compile

ApplyFn = Callable[..., Any]  # (params, inputs) -> logits
Criterion = Callable[[jax.Array, jax.Array], jax.Array]  # (logits, labels) -> loss
Examples = Features | Pictures


class Batch(NamedTuple):
    """One step's examples; `key` (its data) and `position` are those of the batch that follows."""

    inputs: np.ndarray
    labels: np.ndarray
    key: jax.Array
    position: tuple[int, int]


StepFn = Callable[[Any, Batch], tuple[Any, float, float]]
# samples at a time -> the gradients of a device's part of a batch, and the devices
Gradients = Callable[[int], tuple[ValueAndGrad, Mesh]]


class Fitted(NamedTuple):
    """The end of a training run."""

    params: Any
    factors: lance_jax.Factors
    loss: float  # mean over the last epoch
    step_seconds: list[float]  # of every step after warming up
    calibration_seconds: float
    micro_batch: int  # samples that went through the network at a time


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of logits (n, classes) and labels (n,), the mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_of(
    apply_fn: ApplyFn, has_aux: bool = False, criterion: Criterion = cross_entropy
) -> Callable[..., Any]:
    """loss(params, inputs, labels): the criterion of logits = apply_fn(params, inputs).

    With `has_aux` apply_fn gives (logits, aux), and the loss is (loss, aux). What is given by
    keyword goes on to apply_fn.
    """

    def loss(params: Any, inputs: jax.Array, labels: jax.Array, **options: Any) -> Any:
        found = apply_fn(params, inputs, **options)
        if has_aux:
            return criterion(found[0], labels), found[1]
        return criterion(found, labels)

    return loss


def for_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in a form that is fast on the backend that JAX computes on."""
    return lance_jax.lower_for_cpu(fn) if jax.default_backend() == "cpu" else fn


def fit(
    loss: Callable[..., Any],
    params: Any,
    examples: Examples,
    config: Config,
    *,
    epochs: int,
    learning_rate: float,
    field: str,
    trainable: list[str] | None,
    calibrate: Callable[[], lance_jax.Factors] | None,
    directory: Path,
    micro_batch: int | None,
    has_aux: bool = False,
    dropout: bool = False,
    transform: optax.GradientTransformation | None = None,
) -> Fitted:
    """Trains `params` by SGD, going on from the newest checkpoint in `directory` if there is one.

    `loss` is one of `loss_of`. With `has_aux` it gives (loss, aux), and aux replaces its entries of
    `params` after each step: the statistics of batch norm. With `dropout` it is given a key,
    `dropout=key`.
    `transform` comes before everything else that is done to the gradients.
    `calibrate` gives the factors to compress with, once at the start; None trains in plain JAX.
    `trainable` is that of `lance_jax.value_and_grad`. `micro_batch` samples at a time go through
    the network, divided among as many devices as divide them evenly; 0: a number that is chosen at
    the start, by timing, and kept; None: the whole batch, on one device (`has_aux` and `dropout`
    need that). FloatingPointError where a loss is not finite; it names `field`, where the
    configuration has the learning rate.
    """
    size = len(examples.labels)
    loader = Loader(size, config.batch_size, config.seed)
    total = epochs * loader.steps_per_epoch
    cosine = optax.cosine_decay_schedule(learning_rate, total)

    def schedule(count: Any) -> Any:
        return cosine(jnp.asarray(count, jnp.float32))  # its own int32 fails strict promotion

    optimizer = optax.chain(
        *([] if transform is None else [transform]),
        optax.clip_by_global_norm(config.clip),
        optax.sgd(schedule, momentum=config.momentum or None),
    )

    def gradients_with(factors: lance_jax.Factors) -> Gradients:
        compressed = loss if calibrate is None else lance_jax.compress(loss, factors)
        shared = 1 if micro_batch is None else config.batch_size
        return gradients_of(for_device(compressed), trainable, shared, has_aux)

    with Checkpoints(directory / "checkpoints") as checkpoints:
        initial = _initial_state(params, optimizer, trainable, config.seed)
        now = checkpoints.latest(initial)
        if now is None:
            now = _start(initial, calibrate)
            chosen = config.batch_size if micro_batch is None else micro_batch
            chosen = min(chosen, config.batch_size) or _fastest(
                gradients_with(now.factors),
                params,
                (examples.read(np.arange(config.batch_size)), examples.labels[: config.batch_size]),
                directory.name,
            )
            now = now._replace(info={**now.info, "micro_batch": chosen})
            checkpoints.save(now)
        value_and_grad, mesh = gradients_with(now.factors)(now.info["micro_batch"])
        now = now._replace(state=devices.replicate(now.state, mesh))
        loader = Loader(size, config.batch_size, config.seed, tuple(now.info["position"]))
        batches = _batches(examples, loader, now.state["key"])
        log = metrics.Metrics(directory / "metrics.jsonl", now.step)
        _check_lines(log, now.step)
        step_fn = _step_fn(value_and_grad, mesh, optimizer, has_aux, dropout)
        untimed = now.step + WARM_UP_STEPS
        with closing(batches), Progress(*metrics.COLUMNS) as progress:
            bar = progress.add_task(directory.name, total=total, completed=now.step)
            for window in range(1, total + 1):
                if now.step == total:
                    break
                first = now.info["position"][1]
                steps = config.log_every - first % config.log_every
                steps = min(steps, loader.steps_per_epoch - first)
                with _naming(directory, field, learning_rate):
                    line, now = _window(step_fn, now, batches, steps, untimed)
                    if now.step == total:
                        _check_finite(now.state["params"])
                log.append({**line, "learning_rate": float(schedule(now.step - 1))})
                progress.update(bar, completed=now.step)
                if window % config.checkpoint_every == 0 or now.step == total:
                    checkpoints.save(now)
    lines = _check_lines(log, total)
    return _fitted(now, lines, [line for line in lines if line["epoch"] == epochs - 1])


def _check_lines(log: metrics.Metrics, step: int) -> list[dict[str, Any]]:
    """The lines of a run at `step`; ValueError where some were lost."""
    lines = log.lines()
    told = sum(line["steps"] for line in lines)
    if told != step:
        raise ValueError(
            f"{str(log.path)!r} tells of {told} steps of a run that has done {step}; put it back, "
            "or choose another --workdir"
        )
    return lines


def _check_finite(params: Any) -> None:
    """The last step is one that no loss comes after."""
    for path, leaf in leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            raise FloatingPointError(f"after the last step {path!r} holds NaN or Inf")


def gradients_of(
    loss: Callable[..., Any], trainable: list[str] | None, shared: int, has_aux: bool = False
) -> Gradients:
    """The loss's gradients with a number of samples at a time in the network.

    They are divided among as many devices as divide them and `shared` evenly.
    """

    def gradients(samples: int) -> tuple[ValueAndGrad, Mesh]:
        mesh = devices.mesh_for(samples, shared)
        part = samples // mesh.size
        found = lance_jax.value_and_grad(
            loss, trainable=trainable, has_aux=has_aux, micro_batch=part
        )
        return found, mesh

    return gradients


def _fitted(now: Checkpoint, lines: list[dict[str, Any]], last: list[dict[str, Any]]) -> Fitted:
    """The end of a run, from all its lines of metrics and those of the last epoch."""
    steps = sum(line["steps"] for line in last)
    return Fitted(
        params=jax.device_put(now.state["params"], jax.devices()[0]),
        factors=now.factors,
        loss=sum(line["loss"] * line["steps"] for line in last) / steps,
        step_seconds=[seconds for line in lines for seconds in line["step_seconds"]],
        calibration_seconds=now.info["calibration_seconds"],
        micro_batch=now.info["micro_batch"],
    )


@contextmanager
def _naming(directory: Path, field: str, learning_rate: float) -> Iterator[None]:
    """Says of a loss that is not finite where it was, and what to try."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{directory.name}: {error}; try a lower config.{field} than {learning_rate} in "
            f"another workdir. What was written before is in {str(directory)!r}"
        ) from None


def _initial_state(
    params: Any, optimizer: optax.GradientTransformation, trainable: list[str] | None, seed: int
) -> dict[str, Any]:
    partition = lance_jax.value_and_grad(lambda params: 0.0, trainable=trainable).partition
    return {
        "params": params,
        "optimizer": optimizer.init(partition(params)[0]),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def _start(state: Any, calibrate: Callable[[], lance_jax.Factors] | None) -> Checkpoint:
    start = time.perf_counter()
    factors = jax.block_until_ready(calibrate() if calibrate else lance_jax.Factors())
    seconds = time.perf_counter() - start
    return Checkpoint(0, state, factors, {"position": (0, 0), "calibration_seconds": seconds})


def _fastest(gradients: Gradients, params: Any, batch: Any, name: str) -> int:
    """The micro-batch with which a gradient of this batch takes the least time; says so."""
    seconds = least_seconds(in_micro_batches(gradients, params, batch))
    best = min(seconds, key=lambda size: seconds[size])
    times = ", ".join(f"{1e3 * seconds[size]:.1f} of {size}" for size in seconds)
    print(f"{name}: micro-batches of {best} (ms a gradient, in micro-batches: {times})")
    return best


def in_micro_batches(gradients: Gradients, params: Any, batch: Any) -> dict[int, Callable]:
    """Calls that give the gradient of a batch, by the samples that go through at a time.

    The last is that of the whole batch. A micro-batch that would keep more, for the sum of the
    gradients on each device, is left out.
    """
    whole = len(batch[0])
    sizes = [size for size in MICRO_BATCHES if size < whole]
    most = _kept_bytes(gradients, whole, params, batch)
    calls = {}
    for size in (*(n for n in sizes if _kept_bytes(gradients, n, params, batch) <= most), whole):
        value_and_grad, mesh = gradients(size)
        given = devices.replicate(params, mesh), *devices.spread(batch, mesh)
        calls[size] = functools.partial(devices.divided(value_and_grad, mesh), *given)
    return calls


def _kept_bytes(gradients: Gradients, size: int, params: Any, batch: Any) -> int:
    """Bytes that a micro-batch keeps on all devices, with their sums of the gradients."""
    value_and_grad, mesh = gradients(size)
    part = size // mesh.size
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((part, *a.shape[1:]), a.dtype), batch)
    kept = jax.eval_shape(value_and_grad.forward, params, *one)[1]
    sums = value_and_grad.partition(params)[0] if size < len(batch[0]) else None
    arrays = jax.tree.leaves((kept, sums))
    return mesh.size * sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)


def _batches(examples: Examples, loader: Loader, key: jax.Array) -> Generator[Batch, None, None]:
    """Batches from the loader's position on, read ahead; views are drawn by `key` (its data)."""

    @jax.jit
    def draw_views(key: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(jax.random.wrap_key_data(key))
        views = jax.random.randint(subkey, indices.shape, 0, examples.views)
        return jax.random.key_data(key), views

    def draws() -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array, tuple[int, int]]]:
        following = key
        for indices in loader:
            following, views = draw_views(following, indices)
            yield indices, np.asarray(views), following, loader.position

    def read(draw: tuple[np.ndarray, np.ndarray, jax.Array, tuple[int, int]]) -> Batch:
        indices, views, key, position = draw
        return Batch(examples.read(indices, views), examples.labels[indices], key, position)

    return read_ahead(read, draws())


def _window(
    step_fn: StepFn, now: Checkpoint, batches: Iterator[Batch], steps: int, untimed: int
) -> tuple[dict[str, Any], Checkpoint]:
    """Trains for the `steps` of a window, which lie in one epoch. Its line of metrics.

    Steps up to number `untimed` are left out of the times.
    """
    position = now.info["position"]
    epoch, state, losses, seconds = position[0], now.state, [], []
    for step in range(now.step + 1, now.step + steps + 1):
        batch = next(batches)
        state, loss, duration = step_fn(state, batch)
        position = batch.position
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step} (epoch {epoch})")
        losses.append(loss)
        if step > untimed:
            seconds.append(duration)
    line = {
        "step": now.step + steps,
        "epoch": epoch,
        "steps": steps,
        "loss": math.fsum(losses) / steps,
        "step_seconds": seconds,
    }
    info = {**now.info, "position": position}
    return line, now._replace(step=now.step + steps, state=state, info=info)


def _step_fn(
    value_and_grad: ValueAndGrad,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    has_aux: bool,
    dropout: bool,
) -> StepFn:
    """step(state, batch) -> (state, loss, seconds), the seconds without fetching the batch."""
    gradients = devices.divided(value_and_grad, mesh)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def dropout_key(data: jax.Array) -> jax.Array:
        """A key that draws no views, of a generator whose bits cost little."""
        return jax.random.fold_in(jax.random.wrap_key_data(jnp.tile(data, 2), impl="rbg"), 1)

    def step(state: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], float, float]:
        params = state["params"]
        inputs, labels = devices.spread((batch.inputs, batch.labels), mesh)
        options = {"dropout": dropout_key(batch.key)} if dropout else {}
        jax.block_until_ready((inputs, labels, options))

        start = time.perf_counter()
        value, grads = gradients(params, inputs, labels, **options)
        loss, aux = value if has_aux else (value, {})
        trained, frozen = value_and_grad.partition(params)
        trained, optimizer_state = update(trained, state["optimizer"], grads)
        jax.block_until_ready((trained, optimizer_state))
        seconds = time.perf_counter() - start

        params = {**value_and_grad.merge(trained, frozen), **aux}
        state = {"params": params, "optimizer": optimizer_state, "key": batch.key}
        return state, float(loss), seconds

    return step
