"""The PyTorch side of benchmarks.cpu computes the same networks; only where torch is installed."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch comes with the extra `benchmarks`")

# After the check, since they import torch.
from benchmarks import cpu, torch_networks  # noqa: E402
from lance_jax.models import network as networks  # noqa: E402
from tests.real_data import needs_real_data  # noqa: E402
from tests.tolerances import assert_close  # noqa: E402

REAL = ("mcunet-5fps", "mbv2-w0.35")
NAMES = [pytest.param(n, marks=needs_real_data if n in REAL else ()) for n in cpu.NETWORKS]


@pytest.mark.parametrize("memory_format", cpu.FORMATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits(name, memory_format, exact_products):
    network, params = cpu.setting(name)
    x = np.random.default_rng(0).uniform(-1, 1, (2, *network.picture)).astype(np.float32)
    expected = jax.jit(networks.apply_fn(network))(params, x)
    tensors = torch_networks.tensors(params, memory_format)
    found = torch_networks.forward(network, tensors, torch_networks.pictures(x, memory_format))
    assert_close(found.numpy(), np.asarray(expected, np.float64))
