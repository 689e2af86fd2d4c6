"""Teaches one network task after task, by methods that differ only in what they do about the past.

Every task is one training run in WORKDIR/METHOD/task_T, which goes on where it was stopped; what
the next task needs of it is then a checkpoint in WORKDIR/METHOD/tasks.
"""

import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from lance_jax import forgetting, metrics
from lance_jax.checkpoint import Checkpoint, Checkpoints
from lance_jax.config import Config, claim, names
from lance_jax.continual_config import check
from lance_jax.continual_methods import METHODS
from lance_jax.continual_methods.method import Memory, Method, Plan, Setting, nbytes
from lance_jax.continual_tasks import Task, criterion, joined, read_tasks
from lance_jax.loader import Loader, read_ahead
from lance_jax.loop import ApplyFn, Fitted, fit, for_device, loss_of
from lance_jax.memory import Report
from lance_jax.models.alexnet import AlexNet
from lance_jax.models.digits import DigitsNet
from lance_jax.models.network import Network, apply_fn, as_params
from lance_jax.models.resnet import ResNet
from lance_jax.norm_statistics import norm_statistics
from lance_jax.paths import leaves_with_path
from lance_jax.pictures import Pictures
from lance_jax.slices import Slices
from lance_jax.train import device, share_right, versions

ALL_BUT_STATISTICS = ["^(?!batch_stats/)"]


class Course(NamedTuple):
    """What the methods share: a network that begins untrained, and what it is to learn.

    `layers` are the paths of all kernels but the head's.
    """

    network: Network
    params: Any
    layers: list[str]
    tasks: list[Task]


def compare(config: Config, workdir: str | Path) -> list[dict[str, Any]]:
    """Runs every method of `config.method` under `workdir` and prints the comparison."""
    check(config, workdir)
    course = prepare(config, workdir)
    results = [run(config, workdir, method, course) for method in names(config.method)]
    metrics.show_continual_table(results)
    return results


def prepare(config: Config, workdir: str | Path) -> Course:
    """Reads the tasks and initialises the network by the seed."""
    tasks = read_tasks(config)
    network = network_of(config)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    picture = jnp.zeros((1, *network.picture), jnp.float32)
    params = as_params(jax.jit(network.init)(key, picture))
    pictures = {f"task {t}, train": task.train for t, task in enumerate(tasks)}
    pictures |= {f"task {t}, {config.eval_split}": task.test for t, task in enumerate(tasks)}
    claim(config, Path(workdir), pictures, params)
    layers = [layer.path for layer in lance_jax.layers(apply_fn(network), params, picture)]
    return Course(network, params, [path for path in layers if path != "head/kernel"], tasks)


def network_of(config: Config) -> Network:
    """The network of `config.model`, with a head of `config.task_classes` outputs for each task."""
    classes = config.tasks * config.task_classes
    if config.model == "digits":
        return DigitsNet(classes=classes)
    sizes = {"resolution": config.resolution, "width": config.width, "classes": classes}
    if config.model == "alexnet":
        return AlexNet(**sizes)
    return ResNet(small=True, stem_stride=1 if config.resolution <= 32 else 2, **sizes)


def run(
    config: Config, workdir: str | Path, method: str, course: Course | None = None
) -> dict[str, Any]:
    """Teaches all tasks by one method; writes and returns WORKDIR/METHOD/result.json.

    A run that was stopped goes on inside the task it was at, with the numbers of one that was not.
    `course` is what `prepare` gives, where several methods share it.
    """
    check(config, workdir)
    course = prepare(config, workdir) if course is None else course
    directory = Path(workdir) / method
    learner = Learner(config, method, course, directory)
    with Checkpoints(directory / "tasks") as checkpoints:
        now = checkpoints.latest({"params": course.params}) or learner.beginning()
        for task in range(len(learner.stages)):
            now = now._replace(factors=lance_jax.Factors())  # those of the task before
            if task == now.step:
                now = learner.learn(task, now)
                checkpoints.save(now)
            # what is left of a finished task: its metrics, and the checkpoint of its end
            for name in (f"task_{task}", f"task_{task}_probe"):
                shutil.rmtree(directory / name / "checkpoints", ignore_errors=True)
    result = {
        "config": config.to_dict(),
        "method": method,
        **_measures(now.info),
        "memory": _memory(now.info["tasks"]),
        "tasks": now.info["tasks"],
        "versions": versions(),
        "device": device(),
        "seed": config.seed,
    }
    metrics.write_atomically(directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _measures(info: dict[str, Any]) -> dict[str, Any]:
    """The accuracy matrix and its measures; of tasks learnt at once, their mean accuracy alone."""
    matrix, untrained = info["accuracy_matrix"], info["untrained_accuracy"]
    found: dict[str, Any] = {"acc": float(np.mean(matrix[-1])), "bwt": None}
    found |= {"forgetting": None, "fwt": None}
    if len(matrix) == len(untrained):
        found = {
            "acc": forgetting.acc(matrix),
            "bwt": forgetting.bwt(matrix),
            "forgetting": forgetting.forgetting(matrix),
            "fwt": forgetting.fwt(matrix, untrained),
        }
    return {**found, "accuracy_matrix": matrix, "untrained_accuracy": untrained}


def _memory(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes in RAM during the task that needs most, and in storage at the end."""
    most = max(tasks, key=lambda task: sum(task["ram"].values()))
    return {"ram": most["ram"], "kept": most["kept"], "storage": tasks[-1]["storage"]}


class Learner:
    """One method at work on the tasks of a course."""

    def __init__(self, config: Config, method: str, course: Course, directory: Path) -> None:
        self.config, self.course, self.directory = config, course, directory
        self.name = method
        self.method: Method = METHODS[method]
        self.stages = course.tasks
        if self.method.joint:
            self.stages = [Task("all", joined(course.tasks), course.tasks[0].test)]
        self.has_norm = "batch_stats" in course.params

    def beginning(self) -> Checkpoint:
        """Before the first task: the accuracies of the untrained network."""
        params, memory = self.course.params, {"method": {}, "statistics": {}}
        info = {"accuracy_matrix": [], "tasks": []}
        info["untrained_accuracy"] = self._accuracies(params, memory)
        return Checkpoint(0, {"params": params}, lance_jax.Factors(), info, memory)

    def learn(self, task: int, now: Checkpoint) -> Checkpoint:
        """Trains a task, and gives what the run needs to go on with the next."""
        train = self._train_network(task)
        setting = Setting(
            config=self.config,
            task=task,
            apply_fn=apply_fn(train),
            fixed_fn=apply_fn(self._network("frozen")),
            params=now.state["params"],
            layers=self.course.layers,
            pictures=self.stages[task].train,
            batches=functools.partial(self._batches, self.stages[task].train),
            memory=now.memory["method"],
            train=lambda plan, name, epochs: self._fit(task, plan, setting, name, epochs).params,
        )
        plan = self.method.plan(setting)
        fitted = self._fit(task, plan, setting, f"task_{task}", self.config.epochs)
        trained = fitted.params
        if train.batch_stats == "trained":
            seen = setting.pictures if plan.pictures is None else plan.pictures
            apply, batches = plan.wrap(setting.apply_fn), self._batches(seen)
            trained = {**trained, "batch_stats": norm_statistics(apply, trained, batches)}
        evaluated = apply_fn(self._network(self._test_statistics()))
        params, learnt = self.method.learned(setting._replace(params=trained, apply_fn=evaluated))
        memory = {"method": learnt, "statistics": dict(now.memory["statistics"])}
        if self.has_norm and self.config.bn_eval == "task" and not self.method.mixes:
            memory["statistics"][str(task)] = jax.device_get(params["batch_stats"])
        row = self._accuracies(params, memory)
        info = {
            **now.info,
            "accuracy_matrix": [*now.info["accuracy_matrix"], row],
            "tasks": [*now.info["tasks"], self._told(task, plan, fitted, memory)],
        }
        known = len(self.course.tasks) if self.method.joint else task + 1
        print(
            f"{self.name}: {task + 1} of {len(self.stages)} learnt, "
            f"{np.mean(row[:known]):.1%} right over the tasks so far"
        )
        return Checkpoint(task + 1, {"params": params}, fitted.factors, info, memory)

    # Training

    def _network(self, statistics: str) -> Network:
        """The network with "trained" or "frozen" statistics of batch norm."""
        return self.course.network.clone(batch_stats=statistics if self.has_norm else "frozen")

    def _train_network(self, task: int) -> Network:
        frozen = self.config.bn_eval == "frozen" and task > 0
        return self._network("frozen" if frozen else "trained")

    def _fit(self, task: int, plan: Plan, setting: Setting, name: str, epochs: int) -> Fitted:
        network = self._train_network(task)
        has_aux = network.batch_stats == "trained"
        return fit(
            loss_of(plan.wrap(apply_fn(network)), has_aux, criterion(self.config.task_classes)),
            setting.params if plan.params is None else plan.params,
            setting.pictures if plan.pictures is None else plan.pictures,
            self.config,
            epochs=epochs,
            learning_rate=self.config.learning_rate[self.name],
            field=f"learning_rate.{self.name}",
            trainable=plan.trainable or ALL_BUT_STATISTICS,
            calibrate=plan.calibrate,
            directory=self.directory / name,
            # the statistics of the whole batch, and one key of dropout for it
            micro_batch=None if self.has_norm else self.config.batch_size,
            has_aux=has_aux,
            dropout=isinstance(network, AlexNet),
            transform=plan.transform,
        )

    def _batches(self, pictures: Pictures) -> Iterator[jax.Array]:
        """All pictures but for a last short batch, in batches."""
        order = Loader(len(pictures.labels), self.config.batch_size, self.config.seed)
        indices = itertools.islice(order, order.steps_per_epoch)
        return map(jnp.asarray, read_ahead(pictures.read, indices))

    # Evaluation

    def _test_statistics(self) -> str:
        return "trained" if self.config.bn_eval == "batch" else "frozen"

    def _accuracies(self, params: Any, memory: dict[str, Memory]) -> list[float]:
        """Of every task, also of those to come."""
        found = []
        for task, (_, _, test) in enumerate(self.course.tasks):
            own = self.method.params_of(params, memory["method"], task)
            if str(task) in memory["statistics"]:
                own = {**own, "batch_stats": memory["statistics"][str(task)]}
            predict = functools.partial(self._predict, own, task)
            found.append(share_right(predict, test, min(self.config.test_batch, len(test.labels))))
        return found

    @functools.cached_property
    def _predict(self) -> Callable[[Any, int, jax.Array], jax.Array]:
        """(params, task, pictures) -> labels that the task's own head gives."""
        network = self._network(self._test_statistics())
        logits, classes = _logits_alone(apply_fn(network)), self._classes

        @jax.jit
        def predict(params: Any, task: Any, pictures: jax.Array) -> jax.Array:
            first = task * classes
            own = jax.lax.dynamic_slice_in_dim(logits(params, pictures), first, classes, 1)
            return jnp.argmax(own, axis=-1) + first

        return predict

    @property
    def _classes(self) -> int:
        return self.config.task_classes

    # What is told of a task

    def _told(
        self, task: int, plan: Plan, fitted: Fitted, memory: dict[str, Memory]
    ) -> dict[str, Any]:
        """Memory, ranks and times of a task, for result.json."""
        kept = self._kept(task, plan, fitted)
        ram = {"kept": kept["total"], "factors": kept.pop("factors"), **plan.ram}
        storage = {"statistics": nbytes(memory["statistics"])}
        storage |= self.method.storage(memory["method"])
        told = {
            "name": self.stages[task].name,
            "loss": fitted.loss,
            "kept": kept,
            "ram": ram,
            "storage": storage,
            "step_seconds": metrics.spread(fitted.step_seconds),
            "calibration_seconds": fitted.calibration_seconds,
            "update_ranks": {
                path: 0 if layer.frozen else layer.update.shape[-1]
                for path, layer in fitted.factors.items()
                if layer.frozen or layer.update is not None
            },
        }
        if "slices" in memory["method"]:
            kernels = dict(leaves_with_path(self.course.params))
            sizes = {path: math.prod(kernels[path].shape[:-1]) for path in self.course.layers}
            told["dimensions"] = sizes  # of the input's patches or features, layer by layer
            slices = Slices.from_dict(memory["method"]["slices"])
            told["free_dimensions"] = {
                path: size - sum(basis.shape[-1] for basis in slices[path] if basis is not None)
                for path, size in sizes.items()
            }
        return told

    def _kept(self, task: int, plan: Plan, fitted: Fitted) -> dict[str, int]:
        """Bytes kept for the backward pass of one batch, beside plain backprop's; the factors'."""
        network = self._train_network(task)
        rngs = {"dropout": jax.random.key(0, impl="rbg")} if isinstance(network, AlexNet) else {}
        n = self.config.batch_size
        batch = (
            jax.ShapeDtypeStruct((n, *network.picture), jnp.float32),
            jax.ShapeDtypeStruct((n,), jnp.int32),
        )

        def report(apply: ApplyFn, params: Any, **options: Any) -> Report:
            has_aux = network.batch_stats == "trained"
            loss = loss_of(for_device(apply), has_aux, criterion(self._classes))
            return lance_jax.report(functools.partial(loss, **rngs), params, *batch, **options)

        trainable = plan.trainable or ALL_BUT_STATISTICS
        apply, factors = plan.wrap(apply_fn(network)), fitted.factors
        own = report(apply, fitted.params, factors=factors, trainable=trainable)
        # a kernel with an adapter is no parameter, and its layer none that `report` knows
        layers = [*self.course.layers, "^head/"]
        plain = report(apply_fn(network), self.course.params, trainable=layers)
        backprop = plain.saved_bytes_backprop.layer_inputs
        compressed = plan.calibrate is not None
        return {
            "layer_inputs": int(own.saved_bytes.layer_inputs if compressed else backprop),
            "total": int((own.saved_bytes if compressed else own.saved_bytes_backprop).total),
            "layer_inputs_backprop": int(backprop),
            "total_backprop": int(own.saved_bytes_backprop.total),
            "factors": int(own.factor_bytes),
        }


def _logits_alone(apply: ApplyFn) -> ApplyFn:
    """Without the new statistics, where there are some."""
    fast = for_device(apply)

    def logits(params: Any, pictures: jax.Array) -> jax.Array:
        found = fast(params, pictures)
        return found[0] if isinstance(found, tuple) else found

    return logits
