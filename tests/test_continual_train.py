"""The program of continual learning, on two or three tasks of the digits."""

import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from samples import encoded
from settings import settings

from lance_jax import continual, continual_train, forgetting, loop
from lance_jax.continual_methods import METHODS
from lance_jax.slices import Slices

KEYS = {
    "config", "method", "acc", "bwt", "forgetting", "fwt", "accuracy_matrix", "untrained_accuracy",
    "memory", "tasks", "versions", "device", "seed",
}  # fmt: skip
SMALL = {"tasks": 2, "epochs": 2, "log_every": 4, "checkpoint_every": 1}


def small(**changes):
    config = settings("split_digits")
    config.update({**SMALL, **changes})
    return config


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The tasks that these tests share: (config, course)."""
    config = small()
    return config, continual_train.prepare(config, tmp_path_factory.mktemp("course"))


def learnt(course, method, directory, tasks=2, **changes):
    """What a run holds after each of the first tasks, and who learnt them."""
    config = small(method=method, **changes)
    learner = continual_train.Learner(config, method, course[1], directory)
    states = [learner.beginning()]
    for task in range(min(tasks, len(learner.stages))):
        states.append(learner.learn(task, states[-1]))
    return states, learner


@pytest.fixture(scope="module")
def result(course, tmp_path_factory):
    _, shared = course
    workdir = tmp_path_factory.mktemp("whole")
    return continual_train.run(small(epochs=8), workdir, "lance", shared), workdir / "lance"


def test_a_result_says_what_was_measured(result, course):
    found, directory = result
    assert found.keys() == KEYS
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(found))
    matrix = np.asarray(found["accuracy_matrix"])
    assert matrix.shape == (2, 2) and ((matrix >= 0) & (matrix <= 1)).all()
    assert found["acc"] == forgetting.acc(matrix) and found["bwt"] == forgetting.bwt(matrix)
    assert found["forgetting"] == forgetting.forgetting(matrix)
    assert found["fwt"] == forgetting.fwt(matrix, found["untrained_accuracy"])
    # a task is learnt, and better than by the network that has not seen it
    assert (matrix.diagonal() > np.asarray(found["untrained_accuracy"])).all()
    assert [task["name"] for task in found["tasks"]] == ["0, 1", "2, 3"]


def test_memory_is_split_into_what_is_held_and_what_rests(result):
    found, _ = result
    tasks = found["tasks"]
    assert [task["ram"]["factors"] > 0 for task in tasks] == [False, True]
    assert [task["storage"]["slices"] for task in tasks] == sorted(
        task["storage"]["slices"] for task in tasks
    )
    for task in tasks:
        # int4 with its bounds, of float32
        assert task["kept"]["layer_inputs"] * 7 <= task["kept"]["layer_inputs_backprop"]
        assert task["ram"]["kept"] == task["kept"]["total"] < task["kept"]["total_backprop"]
    most = max(tasks, key=lambda task: sum(task["ram"].values()))
    assert found["memory"]["ram"] == most["ram"]
    assert found["memory"]["storage"] == tasks[-1]["storage"]


def test_a_task_trains_with_its_own_factors_alone(tmp_path, monkeypatch):
    """Those of the task before are gone, and no array is a slice or a projection matrix."""
    fit, window, protect = continual_train.fit, loop._window, continual.protect
    before, alive, protected, seen = [], [], {}, []

    def protecting(*args, **kwargs):
        slices = protect(*args, **kwargs)
        for path in slices:
            protected[path] = slices.protected(path)
        return slices

    def watching(*args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in before))
        fitted = fit(*args, **kwargs)
        before[:] = map(weakref.ref, jax.tree.leaves(fitted.factors))
        return fitted

    def listing(*args):
        found = window(*args)
        for p in protected.values():
            projection = p @ p.T
            bad = (p, projection, np.eye(len(p)) - projection)
            for array in jax.live_arrays():
                seen.append(array.shape)
                for one in bad:
                    same = array.shape == one.shape and array.dtype == one.dtype
                    assert not same or np.abs(np.asarray(array) - one).max() > 1e-3
        return found

    monkeypatch.setattr(continual, "protect", protecting)
    monkeypatch.setattr(continual_train, "fit", watching)
    monkeypatch.setattr(loop, "_window", listing)
    continual_train.run(small(tasks=3, epochs=1), tmp_path, "lance")
    assert before, "the last task has factors"
    assert alive == [0, 0, 0]
    # the directions of the factors themselves are among the arrays that were looked at
    ranks = json.loads((tmp_path / "lance" / "result.json").read_text())["tasks"][1]["update_ranks"]
    assert {(len(protected[path]), rank) for path, rank in ranks.items() if rank} <= set(seen)


def test_free_dimensions_fall(result, course):
    found, _ = result
    free = [task["free_dimensions"] for task in found["tasks"]]
    for path in course[1].layers:
        counts = [of[path] for of in free]
        assert counts == sorted(counts, reverse=True) and counts[-1] >= 0


@pytest.mark.parametrize("keep", ["layers", "blocks"])
def test_what_a_task_changes_is_orthogonal_to_what_earlier_tasks_need(course, keep, tmp_path):
    """With LANCE; that GPM's gradients are is in test_continual_methods.py."""
    (_, before, after), _ = learnt(course, "lance", tmp_path, keep=keep)
    slices = Slices.from_dict(before.memory["method"]["slices"])
    start, end = (dict(leaves(state.state["params"])) for state in (before, after))
    moved = 0
    for path in course[1].layers:
        kernel, change = (np.asarray(a, np.float64) for a in (start[path], end[path] - start[path]))
        protected = slices.protected(path)
        leaked = protected.T @ change.reshape(-1, change.shape[-1])
        rounded = 1e-6 * np.abs(kernel).max()  # of the weights themselves, over all steps
        assert np.abs(leaked).max() < 1e-5 * np.abs(change).max() + rounded
        moved += np.abs(change).max() > 1e-4
    assert moved > len(course[1].layers) / 2
    # biases would move the outputs of earlier tasks
    for path in start.keys() - set(course[1].layers) - {"head/kernel", "head/bias"}:
        np.testing.assert_array_equal(end[path], start[path])


def test_blocks_keep_less_than_layers(course, tmp_path):
    """What enters the blocks is less than what enters their layers, and there are no masks."""
    told = {}
    for keep in ("layers", "blocks"):
        (*_, after), _ = learnt(course, "lance", tmp_path / keep, keep=keep)
        told[keep] = after.info["tasks"]
    for layers, blocks in zip(told["layers"], told["blocks"], strict=True):
        assert blocks["kept"]["total"] < 0.6 * layers["kept"]["total"]
        assert blocks["kept"]["total_backprop"] == layers["kept"]["total_backprop"]
    ranks = [told[keep][1]["update_ranks"] for keep in told]
    assert ranks[0].keys() == ranks[1].keys() == set(course[1].layers)


def leaves(params):
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def test_methods_share_the_first_task_but_for_rounding(course, tmp_path):
    """Before anything is protected, projection is plain training."""
    plain, projected = (
        learnt(course, method, tmp_path / method, tasks=1)[0][-1] for method in ("finetune", "gpm")
    )
    jax.tree.map(np.testing.assert_array_equal, plain.state, projected.state)


def test_joint_learns_all_tasks_at_once(course, tmp_path):
    states, learner = learnt(course, "joint", tmp_path)
    tasks = course[1].tasks
    assert len(learner.stages) == 1 and len(states) == 2
    assert len(learner.stages[0].train.labels) == sum(len(task.train.labels) for task in tasks)
    found = continual_train._measures(states[-1].info)
    assert found["bwt"] is found["forgetting"] is found["fwt"] is None
    assert found["acc"] == np.mean(states[-1].info["accuracy_matrix"][0])


def without_times(record):
    if isinstance(record, dict):
        kept = {k: without_times(v) for k, v in record.items() if not k.endswith("_seconds")}
        return kept
    return [without_times(part) for part in record] if isinstance(record, list) else record


class Killed(BaseException):
    """Death at a moment that no code of the program can answer."""


def test_a_run_goes_on_inside_its_task(course, tmp_path, monkeypatch):
    """Stopped in the middle of the second task, and again between its end and its checkpoint.

    With the method that trains most often: first in the short training that tells the ranks, too.
    Death by a signal, with LANCE, is in test_main.py.
    """
    method = "lora_dynamic"
    config, shared = small(method=method), course[1]
    whole = continual_train.run(config, tmp_path / "whole", method, shared)

    workdir = tmp_path / "stopped"
    started = []
    fit = continual_train.fit

    def counting(*args, **kwargs):
        started.append(kwargs["directory"].name)
        return fit(*args, **kwargs)

    monkeypatch.setattr(continual_train, "fit", counting)
    append = continual_train.metrics.Metrics.append

    def dying_at(place, step):
        def dying(log, line):
            if log.path.parent.name == place and line["step"] > step:
                raise Killed
            append(log, line)

        return dying

    for place, step in [("task_1_probe", 1), ("task_1", 8)]:
        with monkeypatch.context() as context:
            context.setattr(continual_train.metrics.Metrics, "append", dying_at(place, step))
            with pytest.raises(Killed):
                continual_train.run(config, workdir, method, shared)
    with monkeypatch.context() as context:
        learned = METHODS[method]._replace(learned=lambda setting: (_ for _ in ()).throw(Killed))
        context.setitem(METHODS, method, learned)
        with pytest.raises(Killed):
            continual_train.run(config, workdir, method, shared)
    assert (workdir / method / "task_1" / "checkpoints").exists()

    found = continual_train.run(config, workdir, method, shared)
    assert without_times(found) == without_times(whole)
    assert started.count("task_0") == 1  # a finished task is never trained again
    assert not (workdir / method / "task_0" / "checkpoints").exists()
    for task in range(SMALL["tasks"]):
        logs = [
            [without_times(json.loads(line)) for line in path.read_text().splitlines()]
            for path in (
                tmp_path / "whole" / method / f"task_{task}" / "metrics.jsonl",
                workdir / method / f"task_{task}" / "metrics.jsonl",
            )
        ]
        assert logs[0] == logs[1]

    started.clear()
    assert without_times(continual_train.run(config, workdir, method, shared)) == without_times(
        whole
    )
    assert started == []  # all of it is finished


def test_another_configuration_needs_another_directory(course, tmp_path):
    config = small(method="finetune")
    continual_train.prepare(config, tmp_path)
    with pytest.raises(ValueError, match="holds a run with config.threshold = 0.97, not 0.5"):
        continual_train.check(small(method="finetune", threshold=0.5), tmp_path)


def test_a_damaged_checkpoint_is_named(course, tmp_path):
    config, shared = small(method="finetune", epochs=1), course[1]
    continual_train.run(config, tmp_path, "finetune", shared)
    newest = max((tmp_path / "finetune" / "tasks").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest / "arrays")
    with pytest.raises(ValueError, match=f"checkpoint '{newest}' cannot be read"):
        continual_train.run(config, tmp_path, "finetune", shared)


def test_a_narrow_residual_network_on_a_folder(tmp_path):
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for c in range(4):
        place = folder / f"class{c}"
        place.mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8) // 2 + 30 * c
            (place / f"{i}.png").write_bytes(encoded(pixels.astype(np.uint8)))
    config = settings("split_miniimagenet")
    config.update(
        {
            "folder": str(folder), "tasks": 2, "task_classes": 2, "batch_size": 4, "width": 2,
            "resolution": 36, "method": "lance",
        }
    )  # fmt: skip
    (found,) = continual_train.compare(config, tmp_path / "run")
    assert np.shape(found["accuracy_matrix"]) == (2, 2)
    assert len(found["tasks"][1]["update_ranks"]) == 20  # all convolutions
    # above 32 pixels the stem halves them: 18, 9, 5, 3, and one average of 2x2
    course = continual_train.prepare(config, tmp_path / "run")
    assert course.params["head"]["kernel"].shape == (16, 4)


def test_adapters_keep_the_inputs_that_backprop_keeps(course, tmp_path):
    """Their layers' kernels are computed, so that no count by layers finds them."""
    (_, first, second), _ = learnt(course, "lora_per_task", tmp_path)
    plain, adapted = (state.info["tasks"][-1]["kept"] for state in (first, second))
    assert adapted["layer_inputs"] == plain["layer_inputs"] == plain["layer_inputs_backprop"]
    assert adapted["total"] > plain["total"]  # and the kernels that they are added to
    assert second.info["tasks"][-1]["ram"]["adapters"] > 0
