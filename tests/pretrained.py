"""Published networks in plain float64 NumPy, straight from a state dict that is drawn by a seed."""

import json

import numpy as np
from safetensors.numpy import save_file

from tests.reference import Conv


class Reference:
    """Layers on NHWC arrays whose tensors are drawn when they are first asked for.

    `tensors` is then the state dict, in the layout of torch: all that the forward pass uses, and
    nothing else. With `trained`, batch norm uses the batch's own statistics, and `updated` holds
    the new running averages.
    """

    def __init__(self, seed: int = 0, trained: bool = False):
        self.tensors, self.updated, self.trained = {}, {}, trained
        self._rng = np.random.default_rng(seed)

    def tensor(self, name, shape, mean=0.0, deviation=0.1):
        if name not in self.tensors:
            drawn = mean + deviation * self._rng.standard_normal(shape)
            self.tensors[name] = drawn.astype(np.float32)
        return self.tensors[name].astype(np.float64)

    def conv(self, x, name, out, kernel, stride=1, padding=None, groups=1, bias=False):
        shape = (out, x.shape[-1] // groups, kernel, kernel)
        weight = self.tensor(f"{name}.weight", shape, deviation=1.4 / np.sqrt(np.prod(shape[1:])))
        sides = [((kernel - 1) // 2 if padding is None else padding,) * 2] * 2
        layout = ("NHWC", "OIHW", "NHWC")
        op = Conv(x.shape, shape, layout, (stride, stride), sides, groups=groups)
        y = op.forward(x, weight)
        return y + self.tensor(f"{name}.bias", out) if bias else y

    def dense(self, x, name, out, bias=True):
        shape = (out, x.shape[-1])
        weight = self.tensor(f"{name}.weight", shape, deviation=1 / np.sqrt(shape[1]))
        y = x @ weight.T
        return y + self.tensor(f"{name}.bias", out) if bias else y

    def norm(self, x, name, epsilon=1e-5):
        n = x.shape[-1]
        running = {
            "mean": self.tensor(f"{name}.running_mean", n),
            "var": np.abs(self.tensor(f"{name}.running_var", n, 1.0)),
        }
        self.tensors[f"{name}.running_var"] = running["var"].astype(np.float32)
        mean, var = running.values()
        if self.trained:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
            for statistic, value in (("mean", mean), ("var", var)):
                new = 0.9 * running[statistic] + 0.1 * value
                self.updated[f"{name}.running_{statistic}"] = new
        return self._scaled((x - mean) / np.sqrt(var + epsilon), name)

    def layer_norm(self, x, name, epsilon=1e-6):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return self._scaled((x - mean) / np.sqrt(var + epsilon), name)

    def _scaled(self, x, name):
        n = x.shape[-1]
        return x * self.tensor(f"{name}.weight", n, 1.0) + self.tensor(f"{name}.bias", n)

    def save(self, path, **architecture):
        """A safetensors file, with an architecture in its metadata where one is given."""
        metadata = {"architecture": json.dumps(architecture)} if architecture else None
        save_file(self.tensors, path, metadata)
        return path


def relu(x):
    return np.maximum(x, 0)


def relu6(x):
    return np.clip(x, 0, 6)


def imagenet_normalized(x):
    """From [-1, 1], by the mean and deviation of pixels in [0, 1]."""
    pixels = (np.asarray(x, np.float64) + 1) / 2
    return (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def pictures(n, side, channels=3):
    """In [-1, 1], by a seed."""
    drawn = np.random.default_rng(1).uniform(-1, 1, (n, side, side, channels))
    return drawn.astype(np.float32)
