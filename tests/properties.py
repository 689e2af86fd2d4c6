"""What holds for every compressed layer, checked for one case of the table at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import reference
from cases import PATH, Case
from jax import lax
from tolerances import assert_close

import lance_jax


class Plan(NamedTuple):
    """What is kept of a case's input."""

    bases: Mapping[str, np.ndarray]
    mean: np.ndarray | None = None
    core_dtype: str | None = None


def factors(case: Case, plan: Plan) -> lance_jax.Factors:
    """Factors of the case's one layer, in the dtype that calibration gives them."""
    dtype = "float64" if case.dtype == "float64" else "float32"
    bases = {mode: jnp.asarray(basis, dtype) for mode, basis in plan.bases.items()}
    mean = None if plan.mean is None else jnp.asarray(plan.mean, dtype)
    return lance_jax.Factors({PATH: lance_jax.LayerFactors(bases, mean, plan.core_dtype)})


def assert_reference(case: Case) -> None:
    """The float64 reference is plain JAX's product and its two gradients."""
    params, x, dy = case.tensors
    w = params["layer"]["kernel"]

    @quick_jit
    def run(x, w, dy):
        y, pull = jax.vjp(case.function, x, w)
        return y, *pull(dy)

    y, dx, dw = run(x, w, dy)
    assert_close(y, case.op.forward(x, w), case.dtype)
    assert_close(dx, case.op.dinput(w, dy), case.dtype)
    assert_close(dw, case.op.dweight(x, dy), case.dtype)


def assert_only_the_core_is_held(case: Case, plans: Mapping[str, Plan]) -> None:
    """Between the passes lives nothing but the core, in the input's dtype."""
    for name, plan in plans.items():
        kept = reference.core(case.op, case.tensors[1], plan.bases)
        size = kept.size * jnp.dtype(case.dtype).itemsize
        assert nbytes(held(case, plan)) == size, name


def assert_same_forward(case: Case, plan: Plan) -> None:
    """Property 1: the compressed forward pass is bit-identical under jit."""
    params, x, _ = case.tensors
    fast = jax.jit(lance_jax.compress(case.apply, factors(case, plan)))(params, x)
    plain = jax.jit(case.apply)(params, x)
    assert fast.dtype == plain.dtype
    assert np.asarray(fast).tobytes() == np.asarray(plain).tobytes()


def quick_jit(function: Callable) -> Callable:
    """jit without LLVM's optimisations, which take longer than what they speed up here."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def gradients(case: Case, plans: Mapping[str, Plan]) -> dict[str, tuple[Any, jax.Array]]:
    """(gradients of the parameters, dX) by plan, the factors a traced argument.

    All plans are compiled together: compiling is what takes the time.
    """

    @quick_jit
    def backward(all_factors, params, x, dy):
        def one(fac):
            return jax.vjp(lance_jax.compress(case.apply, fac), params, x)[1](dy)

        return {name: one(fac) for name, fac in all_factors.items()}

    return backward({name: factors(case, plan) for name, plan in plans.items()}, *case.tensors)


def assert_gradients(case: Case, plans: Mapping[str, Plan]) -> dict[str, jax.Array]:
    """Properties 2 and 4: dX and db of plain backprop, dW of plain backprop at X^.

    Returns dW by plan.
    """
    params, x, dy = case.tensors
    dws = {}
    for name, (dparams, dx) in gradients(case, plans).items():
        dw, db = dparams["layer"]["kernel"], dparams["layer"]["bias"]
        assert (dw.dtype, db.dtype, dx.dtype) == (jnp.dtype(case.dtype),) * 3
        axes = tuple(axis for axis, n in enumerate(db.shape) if n != dy.shape[axis])
        exact = np.asarray(dy, np.float64).sum(axes, keepdims=True)
        assert_close(db, exact, case.dtype, what=f"db with {name}")
        exact = case.op.dinput(params["layer"]["kernel"], dy)
        assert_close(dx, exact, case.dtype, what=f"dX with {name}")
        _assert_dweight(case, plans[name], dw, f"dW with {name}")
        dws[name] = dw
    return dws


def _assert_dweight(case: Case, plan: Plan, dw: jax.Array, what: str) -> None:
    _, x, dy = case.tensors
    used = factors(case, plan)[PATH]
    bases = {mode: np.asarray(u, np.float64) for mode, u in used.bases.items()}
    scale = np.abs(case.op.dweight(x, dy)).max()
    errors = []
    for nudge in (0, 1e-6, -1e-6) if plan.core_dtype else (0,):
        expected = reference.dweight(case.op, x, dy, bases, used.mean, plan.core_dtype, nudge)
        try:
            assert_close(dw, expected, case.dtype, max(scale, np.abs(expected).max()), what)
        except AssertionError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def assert_projection(case: Case, basis: np.ndarray, dw: Any, mode: str) -> None:
    """Property 5: a channel, patch or feature basis alone projects dW orthogonally."""
    _, x, dy = case.tensors
    plain = case.op.dweight(x, dy)
    rows = rows_of(case, plain, mode)  # (groups, n, out)
    projected = reference.projector(basis if basis.ndim == 3 else basis[None])
    scale = np.abs(plain).max()
    got = rows_of(case, np.asarray(dw, np.float64), mode)
    assert_close(got, projected @ rows, case.dtype, scale, "U U^T dW")
    inner, square = np.vdot(got, rows), np.vdot(got, got)
    assert square > 0
    assert_close(inner, square, case.dtype, np.vdot(rows, rows), "<dW, plain dW>")


def rows_of(case: Case, dw: np.ndarray, mode: str) -> np.ndarray:
    """dW as a matrix (groups, n, rest) whose rows are those of a mode's basis."""
    op = case.op
    if mode == "feature":
        x, w, y = op.letters
        contracted = [letter for letter in x if letter in w and letter not in y]
        shared = [letter for letter in x if letter in w and letter in y]
        order = [w.index(letter) for letter in contracted + shared]
        order += [axis for axis, letter in enumerate(w) if letter not in contracted + shared]
        return dw.transpose(order).reshape(1, op.modes["feature"], -1)
    order = [op.layout[1].index(letter) for letter in op.spatial + "IO"]
    dw = dw.transpose(order)
    if mode == "channel":
        return np.moveaxis(dw, -2, 0).reshape(1, op.modes["channel"], -1)
    rows = dw.reshape(op.modes["patch"], op.groups, -1)
    return np.moveaxis(rows, 1, 0)


def held(case: Case, plan: Plan) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of all that lives for the backward pass but the weight and the factors."""
    params, x, _ = case.tensors
    fac = factors(case, plan)

    def forward(params, x):
        return jax.vjp(lance_jax.compress(case.apply, fac), params, x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(forward, params, x))
    leaves = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    for known in (params["layer"]["kernel"], *jax.tree.leaves(fac)):
        # The weight may be held transposed, a factor in its own dtype or in the activation's.
        dtypes = (str(known.dtype), case.dtype)
        same = [e for e in leaves if sorted(e[0]) == sorted(known.shape) and e[1] in dtypes]
        leaves.remove(same[0])
    return leaves


def nbytes(leaves: list[tuple[tuple[int, ...], str]]) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in leaves)


class Backward(NamedTuple):
    """The weight's backward pass: the shapes of all it reads or makes, and its MACs."""

    shapes: list[tuple[int, ...]]
    macs: int


def weight_backward(apply: Callable, params: Any, x: Any) -> Backward:
    """Of the gradient of `params` alone, from its jaxpr."""

    def forward(params, x):
        y, pull = jax.vjp(lambda params: apply(params, x), params)
        return pull, y

    pull, y = jax.eval_shape(forward, params, x)
    jaxpr = jax.make_jaxpr(lambda pull, dy: pull(dy))(pull, y).jaxpr
    shapes = [var.aval.shape for var in (*jaxpr.constvars, *jaxpr.invars)]
    macs = 0
    needed = {var for var in jaxpr.outvars if not isinstance(var, jax.extend.core.Literal)}
    for eqn in reversed(jaxpr.eqns):  # dX is in there too, and is dropped when nobody asks for it
        if needed.isdisjoint(eqn.outvars):
            continue
        needed |= {var for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)}
        for inner in (eqn, *(e for body in bodies(eqn) for e in equations(body))):
            shapes += [var.aval.shape for var in inner.outvars]
        macs += macs_of(eqn)
    return Backward(shapes, macs)


def macs_of(eqn: Any) -> int:
    """MACs of a product or convolution, and of those in bodies: of a choice the dearest branch."""
    size = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive is lax.dot_general_p:
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if eqn.primitive is lax.conv_general_dilated_p:
        kernel = eqn.invars[1].aval
        return size * kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    inner = [sum(map(macs_of, body.eqns)) for body in bodies(eqn)]
    if eqn.primitive.name == "cond":
        return max(inner)
    return eqn.params.get("length", 1) * sum(inner)


def assert_never_rebuilt(case: Case, plans: Mapping[str, Plan], cheaper: bool = True) -> None:
    """No value in the weight's backward pass is the input's size, and dW is `cheaper`.

    Where dy is smaller than the input nothing reaches the input's size at all; where it is larger,
    what is made of dy may, but not in the input's own shape.
    """
    params, x, dy = case.tensors
    plain = weight_backward(case.apply, params, x)
    assert x.shape in plain.shapes  # or a rebuilt input would not be seen
    for name, plan in plans.items():
        fast = lance_jax.compress(case.apply, factors(case, plan))
        backward = weight_backward(fast, params, x)
        for shape in backward.shapes:
            assert _axes(shape) != _axes(x.shape), name
            assert math.prod(shape) < x.size or dy.size > x.size, (name, shape)
        assert not cheaper or backward.macs < plain.macs, (name, backward.macs, plain.macs)


def _axes(shape: tuple[int, ...]) -> list[int]:
    """A shape whatever the order of its axes."""
    return sorted(n for n in shape if n > 1)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside of bodies too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn):
            yield from equations(body)


def bodies(eqn: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(dict(eqn.params), is_leaf=lambda v: hasattr(v, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)
