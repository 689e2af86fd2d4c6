"""What a sequence of tasks cost and gained, from its accuracy matrix.

A (T, T): A[i, j] is the test accuracy of task j after training on task i, both from 0. All of it is
measured, also of tasks to come (j > i).
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def acc(matrix: npt.ArrayLike) -> float:
    """Average accuracy, mean_j A[T-1, j]: how well all tasks are solved at the end.

    Lopez-Paz and Ranzato, Gradient episodic memory, 2017, arXiv 1706.08840, equation 2.
    """
    return float(_checked(matrix)[-1].mean())


def bwt(matrix: npt.ArrayLike) -> float:
    """Backward transfer, mean_{j<T-1} A[T-1, j] - A[j, j]: what later tasks did to earlier ones.

    Negative where they were forgotten; 0 for a single task. Lopez-Paz and Ranzato 2017, equation 3.
    """
    a = _checked(matrix)
    return float(np.mean(a[-1, :-1] - a.diagonal()[:-1])) if len(a) > 1 else 0.0


def forgetting(matrix: npt.ArrayLike) -> float:
    """Mean over j < T-1 of max_{j<=i<T-1} A[i, j] - A[T-1, j]: from the best so far to the end.

    Chaudhry et al., Riemannian walk for incremental learning, 2018, arXiv 1801.10112, section 3,
    where the best is that of the tasks after j was learnt. 0 for a single task. Others call
    -`bwt` forgetting.
    """
    a = _checked(matrix)
    best = [a[j:-1, j].max() for j in range(len(a) - 1)]
    return float(np.mean(best - a[-1, :-1])) if best else 0.0


def fwt(matrix: npt.ArrayLike, untrained: npt.ArrayLike) -> float:
    """Forward transfer, mean_{j>0} A[j-1, j] - b[j]: what earlier tasks did for those to come.

    `untrained` is b (T,), the accuracy of each task before any training. Lopez-Paz and Ranzato
    2017, equation 4. With a head for each task, which is untrained until then, it is near 0 by
    construction; 0 for a single task.
    """
    a, b = _checked(matrix), np.asarray(untrained, np.float64)
    if b.shape != (len(a),):
        raise ValueError(f"untrained has shape {b.shape}; it must be ({len(a)},)")
    return float(np.mean(a.diagonal(1) - b[1:])) if len(a) > 1 else 0.0


def _checked(matrix: Any) -> np.ndarray:
    a = np.asarray(matrix, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.size:
        raise ValueError(f"the accuracy matrix has shape {a.shape}; it must be square")
    if not np.isfinite(a).all():
        raise ValueError("the accuracy matrix holds NaN or Inf")
    return a
