"""The network of the digits."""

import jax

from lance_jax.models import network
from lance_jax.models.digits import DigitsNet


def test_shapes():
    """Two blocks of 8x8, then 4x4, and a picture of one channel."""
    digits = DigitsNet(classes=5)
    params = network.shapes(digits)["params"]
    assert params["stem"]["kernel"].shape == (3, 3, 1, 32)
    assert set(params) == {"stem", "head", *(f"blocks_{i}" for i in range(4))}
    x = jax.ShapeDtypeStruct((2, 8, 8, 1), "float32")
    features = jax.eval_shape(digits.clone(classes=None).apply, {"params": params}, x)
    assert features.shape == (2, 4, 4, 64)
    assert jax.eval_shape(digits.apply, {"params": params}, x).shape == (2, 5)
