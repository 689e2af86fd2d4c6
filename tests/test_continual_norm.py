"""What batch norm uses: statistics of each task, of the test batch, or of the first task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import settings

from lance_jax import continual_train
from lance_jax.continual_tasks import Task
from lance_jax.models.network import apply_fn
from lance_jax.norm_statistics import norm_statistics
from lance_jax.pictures import Pictures

SIDE = 20


def small(**changes):
    config = settings("split_cifar100")
    config.update(
        {
            "tasks": 2, "task_classes": 2, "width": 4, "resolution": SIDE, "epochs": 2,
            "batch_size": 8, "test_batch": 4, "method": "finetune", "log_every": 4, **changes,
        }
    )  # fmt: skip
    return config


def pictures(task, n, seed):
    """Of two classes that differ in a pattern; those of the second task are darker."""
    rng = np.random.default_rng((task, seed))
    labels = (np.arange(n) % 2).astype(np.int32)
    patterns = np.random.default_rng(task).normal(size=(2, SIDE, SIDE, 3)) / 2
    images = patterns[labels] + rng.normal(size=(n, SIDE, SIDE, 3)) / 4 - 0.5 * task
    return Pictures(images.astype(np.float32), labels + np.int32(2 * task), ("a", "b"), SIDE)


TASKS = [Task(f"{t}", pictures(t, 32, 0), pictures(t, 12, 1)) for t in range(2)]


@pytest.fixture
def course(tmp_path, monkeypatch):
    monkeypatch.setattr(continual_train, "read_tasks", lambda config: TASKS)
    return continual_train.prepare(small(), tmp_path / "claimed")


def learnt(course, directory, **changes):
    config = small(**changes)
    learner = continual_train.Learner(config, config.method, course, directory)
    states = [learner.beginning()]
    for task in range(len(learner.stages)):
        states.append(learner.learn(task, states[-1]))
    return states, learner


def statistics_of(learner, state, task):
    """Those of a task's training pictures, by the network as it is."""
    network = apply_fn(learner.course.network.clone(batch_stats="trained"))
    return norm_statistics(
        network, state.state["params"], learner._batches(learner.stages[task].train)
    )


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, expected
    )


def test_each_task_keeps_its_statistics(course, tmp_path):
    (_, first, second), learner = learnt(course, tmp_path)
    stored = second.memory["statistics"]
    assert set(stored) == {"0", "1"}
    assert_close(stored["0"], statistics_of(learner, first, 0))
    assert_close(stored["1"], statistics_of(learner, second, 1))
    jax.tree.map(np.testing.assert_array_equal, stored["0"], first.memory["statistics"]["0"])
    bytes_of_one = sum(leaf.nbytes for leaf in jax.tree.leaves(stored["0"]))
    told = [task["storage"]["statistics"] for task in second.info["tasks"]]
    assert told == [bytes_of_one, 2 * bytes_of_one]

    # a picture's class does not depend on what else is in the test batch
    learner.config.test_batch = 3
    again = learner._accuracies(second.state["params"], second.memory)
    assert again == second.info["accuracy_matrix"][-1]


def test_the_test_batch_s_own(course, tmp_path):
    states, learner = learnt(course, tmp_path, bn_eval="batch")
    assert states[-1].memory["statistics"] == {}
    network = apply_fn(course.network.clone(batch_stats="trained"))
    test, params = TASKS[1].test, states[-1].state["params"]
    right = 0
    for start in range(0, 12, 4):
        logits = network(params, jnp.asarray(test.images[start : start + 4]))[0]
        right += int((jnp.argmax(logits[:, 2:], -1) + 2 == test.labels[start : start + 4]).sum())
    assert states[-1].info["accuracy_matrix"][1][1] == right / 12


@pytest.mark.parametrize("bn_eval", ["task", "batch", "frozen"])
def test_the_importance_of_weights_is_seen_through_the_norms(course, bn_eval, tmp_path):
    """By a batch's own statistics a picture alone would hide all layers but the last."""
    config = small(method="ewc", bn_eval=bn_eval, epochs=1)
    learner = continual_train.Learner(config, "ewc", course, tmp_path)
    memory = learner.learn(0, learner.beginning()).memory["method"]
    for path in course.layers:
        assert memory[path]["importance"].max() > 1e-6, path


def test_frozen_after_the_first_task(course, tmp_path):
    (_, first, second), learner = learnt(course, tmp_path, method="gpm", bn_eval="frozen")
    before, after = (state.state["params"]["batch_stats"] for state in (first, second))
    assert_close(before, statistics_of(learner, first, 0))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # a norm with nothing to learn and frozen statistics keeps nothing
    kept = [task["kept"]["total"] for task in second.info["tasks"]]
    assert kept[1] < 0.6 * kept[0]


def test_batches_of_several_tasks_have_common_statistics(course, tmp_path):
    (_, _, second), _ = learnt(course, tmp_path / "er", method="er", er_pictures=4)
    assert second.memory["statistics"] == {}
    states, _ = learnt(course, tmp_path / "joint", method="joint")
    assert states[-1].memory["statistics"] == {}
    assert len(states[-1].info["accuracy_matrix"][0]) == 2


@pytest.mark.parametrize("method", ["gpm", "lance"])
def test_the_norms_scale_and_shift_are_frozen_after_the_first_task(course, method, tmp_path):
    (_, first, second), _ = learnt(course, tmp_path, method=method)
    norms = [
        [state.state["params"][f"blocks_{i}"][f"{kind}_norm"] for i, kind in blocks]
        for state in (first, second)
        for blocks in [[(0, "conv"), (1, "conv"), (2, "conv"), (3, "dense"), (4, "dense")]]
    ]
    jax.tree.map(np.testing.assert_array_equal, *norms)


def test_dropout_is_for_training_alone(course, tmp_path):
    (_, _, second), learner = learnt(course, tmp_path)
    params = second.state["params"]
    rows = [learner._accuracies(params, second.memory) for _ in range(2)]
    assert rows[0] == rows[1]
    network = apply_fn(course.network)
    x = jnp.asarray(TASKS[0].test.images)
    assert np.any(network(params, x, dropout=jax.random.key(0)) != network(params, x))


def test_what_a_task_gave_stays_as_it_was(course, tmp_path):
    """Its own outputs for its own test pictures, through convolutions, norms and dropout."""
    moved = {}
    for method in ("finetune", "lance"):
        (_, first, second), _ = learnt(
            course, tmp_path / method, method=method, threshold=0.9999, threshold_step=0.0
        )
        x, network = jnp.asarray(TASKS[0].test.images), apply_fn(course.network)
        statistics = second.memory["statistics"]["0"]
        before, after = (
            network({**state.state["params"], "batch_stats": statistics}, x)[:, :2]
            for state in (first, second)
        )
        moved[method] = float(jnp.abs(after - before).max() / jnp.abs(before).max())
    assert moved["lance"] < 0.02 < 0.1 < moved["finetune"]
