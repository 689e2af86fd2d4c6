"""Experience replay: some pictures of each task are kept, and trained on with those of the next.

Chaudhry et al. 2019, arXiv 1902.10486. At most `config.er_pictures` of each task, as many of each
class, drawn at random, in 8 bits a value. An epoch runs over both, and so takes more steps.
"""

from typing import Any

import numpy as np

from lance_jax.continual_methods.method import Memory, Method, Plan, Setting, nbytes
from lance_jax.pictures import Pictures


def _plan(setting: Setting) -> Plan:
    if setting.task == 0:
        return Plan()
    new, old = setting.pictures, replayed(setting.memory)
    images = np.concatenate([new.read(np.arange(len(new.labels))), old[0]])
    pictures = Pictures(images, np.concatenate([new.labels, old[1]]), new.classes, new.side)
    return Plan(pictures=pictures, ram={"replay": nbytes(setting.memory)})


def replayed(memory: Memory) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, side, side, channels) from -1 to 1, and labels (n,), of all tasks so far."""
    images = np.concatenate([part["images"] for part in memory.values()])
    labels = np.concatenate([part["labels"] for part in memory.values()])
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1), labels


def _learned(setting: Setting) -> tuple[Any, Memory]:
    pictures, config = setting.pictures, setting.config
    order = np.random.default_rng((config.seed, setting.task)).permutation(len(pictures.labels))
    each = config.er_pictures // config.task_classes
    labels = pictures.labels[order]
    drawn = np.concatenate([order[labels == label][:each] for label in np.unique(labels)])
    images = np.rint((pictures.read(drawn) + 1) * 127.5).astype(np.uint8)
    part = {"images": images, "labels": pictures.labels[drawn]}
    return setting.params, {**setting.memory, str(setting.task): part}


er = Method(_plan, _learned, storage=lambda memory: {"replay": nbytes(memory)}, mixes=True)
