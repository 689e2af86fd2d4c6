"""Inference and training steps on a CPU beside plain JAX and PyTorch: `python -m benchmarks.cpu`.

The same weights and pictures (of CIFAR-10), all cores, every variant in turn in each round, in
random order. A step is the loss and the gradients of the trained parameters (the last 4 layers and
a head, or all), without the optimiser; LANCE is calibrated on further pictures. Plain JAX is
`jax.jit` of `jax.value_and_grad`. PyTorch runs in the better of its two memory formats, measured,
and its inference as the fastest of eager calls, of traced and frozen ones, of those optimised for
inference, and of halves of the batch. This library runs as the program does, at the fastest
micro-batch of those that it tries, on a device for each core. The interval of a ratio of medians is
a paired bootstrap over rounds. Needs torch.
"""

import argparse
import functools
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict

import lance_jax
from benchmarks import arguments, records, tasks, torch_networks
from benchmarks.networks import load
from benchmarks.step_time import interleaved, one_call, ratio
from lance_jax import devices, loop, train
from lance_jax.config import base
from lance_jax.models import network as networks
from lance_jax.models.network import Network
from lance_jax.problem import trained_layers
from lance_jax.timing import least_seconds

NETWORKS = ("mcunet-5fps", "mbv2-w0.35", "mobilenetv2-1.0", "resnet18")
KINDS = ("forward", "last4", "all")
CALIBRATION = 8  # batches of 32
FORMATS = (torch.contiguous_format, torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=arguments.rounds, default=20)
    given = parser.parse_args()
    devices.use_cores()
    for name in given.networks:
        for size in given.batches:
            for kind in given.kinds:
                record = measure(name, kind, size, given.rounds)
                print(record["network"], kind, size, record["seconds"], record["ratios"])
                records.append(records.RESULTS / "cpu.jsonl", record)


def measure(name: str, kind: str, size: int, rounds: int) -> dict:
    """Median seconds of every variant, and the others' ratios to each of this library's."""
    network, params = load(name)
    pictures = tasks.pictures("cifar10", network.picture[0])
    x, y = pictures.read(range(size)), np.asarray(pictures.labels[:size], np.int64)
    if kind == "forward":
        variants, chosen, ranks = inference(network, params, x), {}, {}
    else:
        batches = np.arange(size, size + CALIBRATION * 32).reshape(CALIBRATION, 32)
        factors = calibrated(network, params, kind, [pictures.read(batch) for batch in batches])
        variants, chosen = steps(network, params, x, y, kind, factors)
        ranks = {path: layer.ranks for path, layer in factors.items()}
    seconds = interleaved(variants, iter(lambda: (), None), rounds)
    ours = [variant for variant in seconds if variant.startswith("lance_jax")]
    return {
        "network": name,
        "kind": kind,
        "batch_size": size,
        "seconds": {variant: median(s) for variant, s in seconds.items()},
        "ratios": {
            f"{other} / {one}": ratio(seconds[other], seconds[one])
            for one in ours
            for other in seconds
            if other not in ours
        },
        "forward_macs": size * macs(network, params),
        "macs_per_second": macs_per_second(),
        "micro_batch": chosen,
        "ranks": ranks,
        "rounds": rounds,
        "versions": {**train.versions(), "torch": torch.__version__},
        "device": train.device(),
    }


def inference(network: Network, params: Any, x: np.ndarray) -> dict[str, Callable]:
    apply_fn = networks.apply_fn(network)
    plain, ours = jax.jit(apply_fn), jax.jit(lance_jax.lower_for_cpu(apply_fn))
    given = jnp.asarray(x)
    mesh = devices.mesh_for(len(x))
    copies, parts = devices.replicate(params, mesh), devices.spread(x, mesh)
    in_torch = [call for f in FORMATS for call in torch_inference(network, params, x, f)]
    return {
        "jax": lambda: plain(params, given),
        "lance_jax": lambda: ours(copies, parts),
        "torch": fastest(in_torch),
    }


def torch_inference(
    network: Network, params: Any, x: np.ndarray, memory_format: Any
) -> list[Callable]:
    """Eager, frozen and optimised calls, each with the batch whole and in halves."""
    p = torch_networks.tensors(params, memory_format)
    pictures = torch_networks.pictures(x, memory_format)
    halves = pictures.split(max(1, len(x) // 2))

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch_networks.forward(network, p, x)

    def run(module: Callable, parts: Any) -> None:
        with torch.inference_mode():
            for part in parts:
                module(part)

    found = []
    for parts in {len(halves): halves, 1: (pictures,)}.values():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and the fastest here
            traced: Any = torch.jit.trace(Module().eval(), parts[0], check_trace=False)
            modules = [
                Module().eval(),
                torch.jit.freeze(traced),
                torch.jit.optimize_for_inference(traced),
            ]
        found += [functools.partial(run, module, parts) for module in modules]
    return found


def calibrated(
    network: Network, params: Any, kind: str, batches: list[np.ndarray]
) -> lance_jax.Factors:
    """The program's factors for the trained layers: its modes, energy and dtype, and the head's."""
    config: Any = base()
    layers, _ = trained_layers(network, 4)
    factors = lance_jax.calibrate(
        lance_jax.lower_for_cpu(networks.apply_fn(network)),
        params,
        map(jnp.asarray, batches),
        select=[f"^{layer}/" for layer in layers] if kind == "last4" else "^(?!head/)",
        energy=config.energy,
        core_dtype=config.core_dtype,
    )
    head = lance_jax.LayerFactors({}, core_dtype=config.core_dtype)
    return lance_jax.Factors({**factors, "head/kernel": head})


def steps(
    network: Network,
    params: Any,
    x: np.ndarray,
    y: np.ndarray,
    kind: str,
    factors: lance_jax.Factors,
) -> tuple[dict[str, Callable], dict[str, int]]:
    """Functions that take one step each, and the micro-batches of this library's."""
    apply_fn = networks.apply_fn(network)
    patterns = ["/(kernel|bias|scale)$"]
    if kind == "last4":
        patterns = train.trainable_patterns("lance", trained_layers(network, 4)[0])
    given, labels = jnp.asarray(x), jnp.asarray(y)
    loss = loop.loss_of(apply_fn)
    trained, _ = lance_jax.value_and_grad(loss, trainable=patterns).partition(params)
    plain = one_call(loss, patterns, params)
    variants: dict[str, Callable] = {"jax": functools.partial(plain, given, labels)}
    chosen = {}
    for name, fn in {
        "lance_jax backprop": lance_jax.lower_for_cpu(apply_fn),
        "lance_jax LANCE": lance_jax.lower_for_cpu(lance_jax.compress(apply_fn, factors)),
    }.items():
        gradients = loop.gradients_of(loop.loss_of(fn), patterns, len(x))
        calls = loop.in_micro_batches(gradients, params, (x, y))
        variants[name] = fastest([*calls.values()])
        chosen[name] = next(size for size, call in calls.items() if call is variants[name])
    paths = [path for path, leaf in flatten_dict(trained, sep="/").items() if leaf is not None]
    variants["torch"] = fastest([torch_step(network, params, x, y, paths, f) for f in FORMATS])
    return variants, chosen


def torch_step(
    network: Network, params: Any, x: Any, y: Any, trained: list[str], memory_format: Any
) -> Callable:
    p = torch_networks.tensors(params, memory_format)
    pictures, labels = torch_networks.pictures(x, memory_format), torch.from_numpy(y)
    leaves = [p[path].requires_grad_() for path in trained]

    def step() -> None:
        logits = torch_networks.forward(network, p, pictures)
        torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), leaves)

    return step


def macs(network: Network, params: Any) -> int:
    """Multiply-accumulates of the layers for one picture."""
    picture = jax.ShapeDtypeStruct((1, *network.picture), jnp.float32)
    found = lance_jax.layers(networks.apply_fn(network), params, picture)
    return sum(layer.macs for layer in found)


def macs_per_second(n: int = 2048) -> float:
    """Of a large matrix product in PyTorch, on all cores.

    A convolution hardly runs faster, but that of 3x3 may need fewer (Winograd's algorithm).
    """
    a, b = torch.rand(n, n), torch.rand(n, n)
    return n**3 / least_seconds({"product": lambda: a @ b})["product"]


def fastest(candidates: list[Callable]) -> Callable:
    """The one with the least time."""
    seconds = least_seconds(dict(enumerate(candidates)))
    return candidates[min(seconds, key=lambda i: seconds[i])]


if __name__ == "__main__":
    arguments.run(main)
