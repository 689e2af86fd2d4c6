"""Settings of continual learning that cannot be end in one line that names them."""

import ml_collections
import pytest
from settings import settings

from lance_jax import continual_config


@pytest.mark.parametrize(
    "name", ["split_digits", "split_cifar100", "split_miniimagenet", "five_datasets"]
)
def test_the_configurations_are_right(name, tmp_path):
    config = settings(name)
    continual_config.check(config, tmp_path)
    assert "tasks" in config  # by which the program knows them


def without(config, name):
    del config[name]
    return config


BAD = {
    "no method": ("split_digits", {"method": ""}, "config.method is empty; give one or more of"),
    "unknown method": ("split_digits", {"method": "gpn"}, "config.method is 'gpn'; it must be one"),
    "no data": ("split_cifar100", {"datasets": ""}, "config.datasets is empty; name the data set"),
    "twice": ("five_datasets", {"datasets": "mnist,mnist", "tasks": 2}, "names one of them twice"),
    "several": ("five_datasets", {"tasks": 4}, "each of several data sets is a task, so it must"),
    "another's model": ("split_digits", {"datasets": "mnist"}, "the digits have a network of"),
    "norm": ("split_cifar100", {"bn_eval": "tasks"}, "must be one of 'task', 'batch', 'frozen'"),
    "model": ("split_cifar100", {"model": "alexnett"}, "config.model is 'alexnett'; it must be"),
    "kept": ("split_digits", {"core_dtype": "int5"}, "config.core_dtype is 'int5'; it must be"),
    "no task": ("split_digits", {"tasks": 0}, "config.tasks is 0; it must be at least 1"),
    "one class": ("split_digits", {"task_classes": 1}, "config.task_classes is 1; it must be at"),
    "test batch": ("split_digits", {"test_batch": 0}, "config.test_batch is 0; it must be at"),
    "lone": (
        "split_cifar100",
        {"bn_eval": "batch", "test_batch": 1},
        "config.test_batch is 1; it must be at least 2",
    ),
    "one a step": ("split_cifar100", {"batch_size": 1}, "config.batch_size is 1; it must be at"),
    "authors": ("split_digits", {"authors_energy": 0.0}, "config.authors_energy is 0.0; it must"),
    "small": ("split_cifar100", {"resolution": 18}, "config.resolution is 18; it must be at least"),
    "threshold": ("split_digits", {"threshold": 0.0}, "config.threshold is 0.0; it must lie in"),
    "step": (
        "split_digits",
        {"threshold_step": -0.1},
        "config.threshold_step is -0.1; it must",
    ),
    "past one": (
        "split_digits",
        {"threshold_step": 0.01},
        r"config.threshold_step is 0.01: from config.threshold, 0.97, it comes to 1.01 after 5 "
        r"tasks, and a share is at most 1; 0.0075 would do",
    ),
    "type": ("split_digits", {"keep": None}, "config.keep is None; it must be a string"),
    "same method": ("split_digits", {"method": "lance,lance"}, "config.method is 'lance,lance', "),
    "classes": ("five_datasets", {"classes": "a,b"}, "config.classes is 'a,b', but of several"),
    "endless": ("split_digits", {"threshold_step": float("inf")}, "config.threshold_step is inf"),
    "few": ("split_digits", {"method": "er", "er_pictures": 1}, "config.er_pictures is 1; it must"),
    "mixed": ("five_datasets", {"datasets": "digits,mnist", "tasks": 2}, "the digits have a"),
    "energy": ("split_digits", {"energy": 1.5}, r"config.energy is 1.5; it must lie in \(0, 1\]"),
    "scale": ("split_digits", {"scale": 0.0}, "config.scale is 0.0; it must be positive and"),
    "penalty": ("split_digits", {"ewc_strength": -1.0}, "config.ewc_strength is -1.0; it must be"),
    "replay": ("split_digits", {"er_pictures": 0}, "config.er_pictures is 0; it must be at least"),
    "rank": ("split_digits", {"lora_rank": 0}, "config.lora_rank is 0; it must be at least 1"),
    "share": ("split_digits", {"lora_energy": 0.0}, "config.lora_energy is 0.0; it must lie in"),
    "momentum": ("split_digits", {"momentum": 1.0}, r"config.momentum is 1.0; it must lie in \[0"),
    "seed": ("split_digits", {"seed": 2**32}, "config.seed is 4294967296; it must be below"),
    "files": ("split_miniimagenet", {"unreadable": "skp"}, "config.unreadable is 'skp'; it must"),
}


@pytest.mark.parametrize(("name", "changes", "message"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_named(name, changes, message, tmp_path):
    config = settings(name)
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        continual_config.check(config, tmp_path)


def test_a_missing_field_is_named(tmp_path):
    config = settings("split_digits")
    with pytest.raises(ValueError, match="config.scale is missing; begin with lance_jax.continual"):
        continual_config.check(without(config, "scale"), tmp_path)


def test_a_bad_rate_is_named(tmp_path):
    config = settings("split_digits")
    config.learning_rate = ml_collections.ConfigDict({"finetune": 0.1, "gpm": 0.0, "lance": 0.1})
    with pytest.raises(ValueError, match="config.learning_rate.gpm is 0.0; it must be positive"):
        continual_config.check(config, tmp_path)
    config.learning_rate = ml_collections.ConfigDict({"finetune": 0.1, "gpm": "x", "lance": 0.1})
    with pytest.raises(ValueError, match="config.learning_rate.gpm is 'x'; it must be positive"):
        continual_config.check(config, tmp_path)
    config.learning_rate = ml_collections.ConfigDict({"finetune": 0.1})
    with pytest.raises(ValueError, match="config.learning_rate has no entry 'gpm'"):
        continual_config.check(config, tmp_path)


def test_what_is_protected_may_come_to_all_of_it(tmp_path):
    config = settings("split_digits")
    config.threshold_step = 0.0075
    continual_config.check(config, tmp_path)
    assert continual_config.threshold(config, config.tasks - 1) == 1.0
