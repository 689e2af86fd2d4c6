"""The kernel's gradient from a core whose rows are expanded a few at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import bases, conv

from lance_jax import shifted
from lance_jax.conv import Conv
from tests.properties import equations
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("exact_products")

CASES = [
    conv("stride 1", (2, 9, 8, 4), (3, 3, 1, 4), padding="SAME", groups=4),
    conv("stride 2", (2, 9, 8, 4), (3, 3, 1, 4), strides=(2, 2), padding="SAME", groups=4),
    conv("uneven", (2, 9, 7, 4), (3, 2, 1, 4), strides=(1, 3), padding=[(0, 2), (1, 0)], groups=4),
    conv("dilated", (2, 16, 9, 4), (3, 2, 1, 4), dilation=(2, 3), padding="SAME", groups=4),
    conv(
        "input dilated", (2, 5, 6, 4), (3, 3, 1, 4), x_dilation=(2, 3), padding=[(1, 1), (2, 0)],
        groups=4,
    ),
    conv("bfloat16", (2, 9, 8, 4), (3, 3, 1, 4), "bfloat16", padding="SAME", groups=4),
    conv("cropped", (2, 9, 8, 4), (3, 3, 1, 4), padding=[(-1, 2), (0, -2)], groups=4),
    conv("multiplier", (2, 6, 8, 4), (3, 3, 1, 12), strides=(2, 1), padding="SAME", groups=4),
    conv("float64", (2, 9, 8, 4), (3, 3, 1, 4), "float64", padding="SAME", groups=4),
    conv(
        "three axes", (2, 4, 5, 6, 3), (2, 3, 1, 1, 3), groups=3, padding="SAME",
        layout=("NDHWC", "DHWIO", "NDHWC"),
    ),
]  # fmt: skip


def convolution(case):
    """The layer of the package, of a case."""
    params, x, _ = case.tensors
    jaxpr = jax.make_jaxpr(case.function)(x, params["layer"]["kernel"]).jaxpr
    names = {eqn.primitive.name: eqn for eqn in equations(jaxpr)}
    return Conv.of(names["conv_general_dilated"])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_gradient_is_that_at_the_expanded_core(case, first, last):
    """With the first spatial axis, the others, all and none of them projected."""
    op, (_, x, dy) = case.op, case.tensors
    names = op.default_modes
    chosen = (names[:1] if first else ()) + (names[1:] if last else ())
    drawn = bases(op, chosen, case.generator)
    core = reference.core(op, x, drawn)
    expected = op.dweight(reference.rebuild(op, core, drawn), dy)
    with case.context():
        matrices = [jnp.asarray(drawn[m], case.dtype) if m in drawn else None for m in names]
        args = jnp.asarray(core, case.dtype), jnp.asarray(dy, case.dtype), matrices
        layer = convolution(case)
        found = jax.jit(lambda *args: shifted.kernel_gradient_of_core(layer, *args))(*args)
        assert_close(found, expected, case.dtype)


def test_only_a_part_of_the_input_is_there_at_a_time():
    case = conv("large", (2, 32, 32, 8), (3, 3, 1, 8), padding="SAME", groups=8)
    layer, (_, x, dy) = convolution(case), case.tensors
    drawn = bases(case.op, ("height", "width"), case.generator)
    core = jnp.asarray(reference.core(case.op, x, drawn), jnp.float32)
    matrices = [jnp.asarray(drawn[mode], jnp.float32) for mode in ("height", "width")]
    gradient = jax.make_jaxpr(lambda *a: shifted.kernel_gradient_of_core(layer, *a))
    shapes = [
        v.aval.shape for e in equations(gradient(core, dy, matrices).jaxpr) for v in e.outvars
    ]
    part = shifted.core_part(layer)
    assert part == 3 * 34 / (2 * 32**2), "a row of dy, and one more on either side"
    assert max(map(np.prod, shapes)) < x.size
    assert (1, 3, 34, 8) in shapes and part * x.size == 3 * 34 * 8


def test_what_it_costs():
    """A kernel of one place: each row is expanded once, and all outputs are summed up."""
    case = conv("one place", (2, 12, 10, 3), (1, 1, 1, 3), groups=3)
    expanded = 12 * (5 * 4 + 10 * 4) * 3
    found = shifted.core_macs(convolution(case), (5, 4))
    assert found == expanded + shifted._ELEMENTWISE * 12 * 10 * 3
