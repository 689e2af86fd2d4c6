"""Tasks: classes of one data set in turn, several sets, folders; and whose logits count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_data import TFDS, needs_real_data
from samples import encoded
from settings import settings

from lance_jax import continual_tasks, data


def small(name="split_digits", **changes):
    config = settings(name)
    config.update(changes)
    return config


def test_two_digits_at_a_time():
    tasks = continual_tasks.read_tasks(small())
    assert [task.name for task in tasks] == ["0, 1", "2, 3", "4, 5", "6, 7", "8, 9"]
    for t, task in enumerate(tasks):
        for part, split in ((task.train, "train"), (task.test, "test")):
            assert set(part.labels) == {2 * t, 2 * t + 1} and part.labels.dtype == np.int32
            whole = data.digits(split)
            own = np.isin(whole.labels, (2 * t, 2 * t + 1))
            mine, theirs = (sorted(map(bytes, of)) for of in (part.images, whole.images[own]))
            assert mine == theirs


def test_the_order_of_classes_is_drawn_by_its_seed():
    names = [
        [task.name for task in continual_tasks.read_tasks(small(class_seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    tasks = continual_tasks.read_tasks(small(class_seed=0))
    digits = data.digits("train")
    for t, task in enumerate(tasks):
        for j, name in enumerate(task.name.split(", ")):
            mine = task.train.images[task.train.labels == 2 * t + j]
            np.testing.assert_array_equal(mine, digits.images[digits.labels == int(name)])


def test_validation_is_held_out_of_the_training_pictures():
    test, validation = (
        continual_tasks.read_tasks(small(eval_split=split)) for split in ("test", "validation")
    )
    for one, other in zip(test, validation, strict=True):
        assert len(other.train.labels) + len(other.test.labels) == len(one.train.labels)
        known = {image.tobytes() for image in one.train.images}
        assert {image.tobytes() for image in other.test.images} <= known
        assert not {image.tobytes() for image in one.test.images} & known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 6}, "config.tasks = 6 of config.task_classes = 2 are 12 classes, and data set"),
        ({"classes": "0,1,2", "tasks": 2}, "are 4 classes, and config.classes has 3"),
        ({"classes": "0,1,2,1", "tasks": 2}, "config.classes is '0,1,2,1', which names one of"),
        ({"classes": "0,1,2,x", "tasks": 2}, "unknown class 'x' in data set 'digits'"),
        ({"batch_size": 1000}, "config.batch_size is 1000; it must be 1 to 2"),
    ],
)
def test_what_the_pictures_do_not_have_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        continual_tasks.read_tasks(small(**changes))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_pictures_is_an_error(monkeypatch, split):
    whole = data.digits

    def digits(of):
        part = whole(of)
        return part.take(np.flatnonzero(part.labels != 3)) if of == split else part

    monkeypatch.setattr(data, "digits", digits)
    told = rf"task 1 \(2, 3\) has no pictures of class '3' in the {split} split; it needs at least"
    with pytest.raises(ValueError, match=told):
        continual_tasks.read_tasks(small())


def test_the_order_of_classes_can_be_told():
    tasks = continual_tasks.read_tasks(small(classes="7,2,9,0", tasks=2))
    assert [task.name for task in tasks] == ["7, 2", "9, 0"]
    digits = data.digits("train")
    for label, name in enumerate((7, 2, 9, 0)):
        part = tasks[label // 2].train
        mine = part.images[part.labels == label]
        np.testing.assert_array_equal(mine, digits.images[digits.labels == name])


def folder_of(path, classes=6, pictures=4, side=20):
    rng = np.random.default_rng(0)
    for c in range(classes):
        for split, count in (("train", pictures), ("test", 2)):
            place = path / split / f"class{c}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
                (place / f"{i}.png").write_bytes(encoded(pixels))
    return path


def test_a_folder_in_tasks(tmp_path):
    config = small(
        "split_miniimagenet", folder=str(folder_of(tmp_path)), tasks=3, task_classes=2,
        batch_size=2, resolution=20,
    )  # fmt: skip
    tasks = continual_tasks.read_tasks(config)
    order = continual_tasks.class_order(config, tuple(f"class{c}" for c in range(6)))
    assert [task.name for task in tasks] == [", ".join(order[2 * t : 2 * t + 2]) for t in range(3)]
    assert sorted(order) == [f"class{c}" for c in range(6)] and list(order) != sorted(order)
    for t, task in enumerate(tasks):
        assert task.train.read([0]).shape == (1, 20, 20, 3)
        np.testing.assert_array_equal(np.bincount(task.train.labels)[2 * t :], [4, 4])
        np.testing.assert_array_equal(np.bincount(task.test.labels)[2 * t :], [2, 2])
    # a test batch is not of one class, as the folder's files are in order
    assert any(list(task.test.labels) != sorted(task.test.labels) for task in tasks)
    whole = continual_tasks.joined(tasks)
    assert len(whole.labels) == 24 and set(whole.labels) == set(range(6))
    np.testing.assert_array_equal(whole.read([9]), tasks[1].train.read([1]))


def test_twenty_tasks_as_published(tmp_path):
    folder = folder_of(tmp_path, classes=100, pictures=2, side=12)
    tasks = continual_tasks.read_tasks(
        small("split_miniimagenet", folder=str(folder), batch_size=2, resolution=12)
    )
    assert len(tasks) == 20
    found = [name for task in tasks for name in task.name.split(", ")]
    assert sorted(found) == sorted(f"class{c}" for c in range(100))
    for t, task in enumerate(tasks):
        assert set(task.train.labels) == set(task.test.labels) == set(range(5 * t, 5 * t + 5))


def test_arrays_of_several_tasks_together():
    tasks = continual_tasks.read_tasks(small())
    whole = continual_tasks.joined(tasks)
    assert isinstance(whole.images, np.ndarray)
    np.testing.assert_array_equal(
        whole.labels, np.concatenate([task.train.labels for task in tasks])
    )


@needs_real_data
def test_five_data_sets():
    config = small("five_datasets", data_dir=str(TFDS))
    tasks = continual_tasks.read_tasks(config)
    assert [task.name for task in tasks] == config.datasets.split(",")
    for t, task in enumerate(tasks):
        assert task.train.read([0, 1]).shape == (2, 32, 32, 3)
        assert set(task.train.labels) == set(range(10 * t, 10 * t + 10))


@needs_real_data
def test_several_sets_have_the_same_number_of_classes():
    config = small("five_datasets", data_dir=str(TFDS), datasets="mnist,cifar100", tasks=2)
    with pytest.raises(ValueError, match="data set 'cifar100' has 100 classes; each of several"):
        continual_tasks.read_tasks(config)


def test_of_the_logits_those_of_the_own_task_count():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(7, 12)), jnp.float32)
    labels = jnp.asarray([0, 2, 3, 5, 8, 11, 9])
    own = continual_tasks.own_logits(logits, labels, 3)
    for row, label, found in zip(logits, labels, own, strict=True):
        first = int(label) // 3 * 3
        np.testing.assert_array_equal(found, row[first : first + 3])
    loss = continual_tasks.criterion(3)(logits, labels)
    each = [
        np.log(np.exp(np.asarray(one, np.float64)).sum()) - float(one[int(label) % 3])
        for one, label in zip(own, labels, strict=True)
    ]
    np.testing.assert_allclose(loss, np.mean(each), rtol=1e-5)
    # other tasks' outputs have no gradient, so their heads stay as they are
    grads = jax.grad(continual_tasks.criterion(3))(logits, labels)
    for label, row in zip(labels, np.asarray(grads), strict=True):
        first = int(label) // 3 * 3
        assert not np.delete(row, np.s_[first : first + 3]).any()
