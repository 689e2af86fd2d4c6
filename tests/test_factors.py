"""Factors: a frozen mapping, a pytree, a table."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import orthonormal

import lance_jax
from lance_jax import Factors, LayerFactors


def conv_layer(**options):
    return LayerFactors({"height": jnp.eye(6, 2), "channel": jnp.eye(8, 3)}, **options)


def two_layers():
    dense = LayerFactors({"feature": jnp.eye(16, 4, dtype=jnp.bfloat16)}, jnp.ones((16,)), "int4")
    return Factors({"conv/kernel": conv_layer(), "dense/kernel": dense})


def test_a_mapping():
    fac = two_layers()
    assert isinstance(fac, Mapping)
    assert list(fac) == ["conv/kernel", "dense/kernel"]
    assert len(fac) == 2
    assert "dense/kernel" in fac
    assert "other" not in fac
    assert fac.get("other") is None
    assert fac["dense/kernel"].core_dtype == "int4"
    assert [path for path, _ in fac.items()] == list(fac.keys())
    with pytest.raises(KeyError):
        fac["other"]
    assert fac.skipped == ()
    assert len(Factors({})) == 0


def test_a_layer_holds_what_it_was_given():
    layer = conv_layer()
    assert set(layer.bases) == {"height", "channel"}
    assert layer.bases["channel"].shape == (8, 3)
    assert layer.mean is None
    assert layer.core_dtype is None
    assert LayerFactors({}).bases == {}


def test_frozen():
    fac = two_layers()
    layer = fac["conv/kernel"]
    with pytest.raises(AttributeError):
        layer.core_dtype = "int8"
    with pytest.raises(AttributeError):
        layer.bases = {}
    with pytest.raises(AttributeError):
        del layer.mean
    with pytest.raises(AttributeError):
        fac.skipped = ()
    with pytest.raises(AttributeError):
        layer.other = 1
    with pytest.raises(TypeError):
        layer.bases["channel"] = jnp.ones((8, 1))  # pyright: ignore
    with pytest.raises(TypeError):
        fac["conv/kernel"] = layer  # pyright: ignore


def test_later_changes_to_the_dictionaries_do_not_reach_in():
    bases = {"feature": jnp.eye(4, 2)}
    layers = {"w": LayerFactors(bases)}
    fac = Factors(layers)
    bases.clear()
    layers.clear()
    assert fac["w"].bases["feature"].shape == (4, 2)


def test_a_pytree():
    fac = two_layers()
    leaves, structure = jax.tree.flatten(fac)
    assert sorted(leaf.shape for leaf in leaves) == [(6, 2), (8, 3), (16,), (16, 4)]
    back = jax.tree.unflatten(structure, leaves)
    assert isinstance(back, Factors)
    assert isinstance(back["dense/kernel"], LayerFactors)
    assert list(back) == list(fac)
    for path, layer in fac.items():
        assert back[path].core_dtype == layer.core_dtype
        assert (back[path].mean is None) == (layer.mean is None)
        assert dict(back[path].bases).keys() == dict(layer.bases).keys()
        for mode, basis in layer.bases.items():
            assert back[path].bases[mode] is basis
    double = jax.tree.map(lambda leaf: 2 * leaf, fac)
    np.testing.assert_array_equal(double["conv/kernel"].bases["height"], 2 * np.eye(6, 2))


def test_leaves_have_readable_paths():
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_flatten_with_path(two_layers())[0]
    ]
    assert "dense/kernel/bases/feature" in paths
    assert len(set(paths)) == 4


def test_the_core_dtype_and_the_modes_belong_to_the_structure():
    def structure(core_dtype, mode="feature", path="w"):
        layer = LayerFactors({mode: jnp.eye(4, 2)}, core_dtype=core_dtype)
        return jax.tree.structure(Factors({path: layer}))

    assert structure("int4") == structure("int4")
    assert structure("int4") != structure("int8")
    assert structure("int4") != structure("int4", mode="token")
    assert structure("int4") != structure("int4", path="v")


def test_an_argument_of_a_jitted_function():
    traces = 0

    @jax.jit
    def total(fac):
        nonlocal traces
        traces += 1
        assert fac["dense/kernel"].core_dtype == "int4"
        return fac["conv/kernel"].bases["channel"].sum(), fac

    fac = two_layers()
    value, back = total(fac)
    assert value == 3
    assert isinstance(back, Factors)
    assert back["dense/kernel"].core_dtype == "int4"
    value, _ = total(jax.tree.map(lambda leaf: 3 * leaf, fac))
    assert (value, traces) == (9, 1)


def test_trees_of_anything_may_pass_through():
    """jax puts objects, None and shapes in place of the arrays."""
    fac = two_layers()
    shapes = jax.eval_shape(lambda fac: fac, fac)
    assert shapes["conv/kernel"].bases["height"].shape == (6, 2)
    names = jax.tree.map(lambda _: "leaf", fac)
    assert names["conv/kernel"].bases["height"] == "leaf"
    empty = jax.tree.map(lambda _: None, fac)
    assert jax.tree.leaves(empty) == []
    repr(shapes)


def test_bytes():
    fac = two_layers()
    assert fac.nbytes == 4 * (6 * 2 + 8 * 3) + 2 * 16 * 4 + 4 * 16
    assert Factors({}).nbytes == 0


def test_the_table_shows_ranks_and_bytes():
    fac = two_layers()
    rows = repr(fac).splitlines()
    (conv,) = [row for row in rows if "conv/kernel" in row]
    (dense,) = [row for row in rows if "dense/kernel" in row]
    assert re.search(r"height\D*2\b", conv)
    assert re.search(r"channel\D*3\b", conv)
    assert re.search(r"\b144\b", conv)
    assert re.search(r"feature\D*4\b", dense)
    assert "int4" in dense
    assert re.search(r"\b192\b", dense)
    assert any(re.search(r"\b336\b", row) for row in rows)
    assert str(fac) == repr(fac)


@pytest.mark.parametrize("dtype", ["int2", "float16", "INT8", jnp.int8, 8], ids=str)
def test_unknown_core_dtype(dtype):
    with pytest.raises(ValueError, match="core_dtype") as error:
        conv_layer(core_dtype=dtype)
    assert repr(dtype) in str(error.value)
    assert all(known in str(error.value) for known in ("None", "bfloat16", "int8", "int4"))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8", "int4"])
def test_known_core_dtypes(dtype):
    assert conv_layer(core_dtype=dtype).core_dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 2],), "bases is a list"),
        (({"feature": [[1.0]]},), "'feature' basis is a list"),
        (({}, 3.0), "mean is a float"),
        (({"feature": np.ones((4, 2))},), "'feature' basis are not orthonormal.* by 4"),
        (({"channel": jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])},), "'channel' basis are not ortho"),
        (({"feature": np.full((4, 2), np.nan)},), "'feature' basis holds NaN"),
    ],
)
def test_bases_that_are_none(arguments, words):
    with pytest.raises(ValueError, match=words):
        LayerFactors(*arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_bases_are_welcome(dtype):
    basis = orthonormal(np.random.default_rng(0), 64, 17).astype(jnp.dtype(dtype))
    assert LayerFactors({"feature": basis}).ranks == {"feature": 17}


def test_traced_bases_are_not_looked_at():
    def ranks(basis):
        return len(LayerFactors({"feature": basis}).bases)

    assert jax.jit(ranks)(jnp.ones((4, 2))) == 1
    assert LayerFactors({"feature": jax.ShapeDtypeStruct((4, 2), jnp.float32)}).nbytes == 32


def test_something_else_than_layer_factors():
    with pytest.raises(ValueError, match="dense/kernel.*LayerFactors"):
        Factors({"dense/kernel": {"feature": jnp.ones((4, 2))}})  # pyright: ignore


def test_compress_takes_a_plain_mapping_too():
    x, w = jnp.ones((3, 4)), {"w": jnp.ones((4, 2))}

    def apply(params, x):
        return x @ params["w"]

    layers = {"w": LayerFactors({"feature": jnp.eye(4)})}
    np.testing.assert_array_equal(lance_jax.compress(apply, layers)(w, x), apply(w, x))


def test_a_numpy_dtype_is_no_core_dtype():
    with pytest.raises(ValueError, match="core_dtype"):
        LayerFactors({}, core_dtype=np.dtype("int8"))  # pyright: ignore
