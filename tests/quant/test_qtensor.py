"""QTensor as a pytree: everything JAX does to a tree, and the sizes it reports."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_stack.errors import UserError
from tpu_stack.quant import FORMATS as EVERY_FORMAT
from tpu_stack.quant import QTensor, abstract_qtensor, matmul, quantize


def gaussian(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize("format", ["int4", "nvfp4", "int1"])
def test_scan_slices_stacked_layers(format):
    stacked = quantize(gaussian(3, 64, 64), format)
    x = gaussian(2, 64)

    def layer(h, w):
        assert isinstance(w, QTensor)
        return matmul(h, w), None

    out, _ = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(x, stacked)
    expected = x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        expected = matmul(expected, one, implementation="xla")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-2)


FORMATS = [name for name, fmt in EVERY_FORMAT.items() if fmt.quantized]


@pytest.mark.parametrize(
    ("format", "axis"), [*((format, -2) for format in FORMATS), ("int8", -1), ("fp8_e5m2", -1)]
)
def test_abstract_matches_eval_shape_and_reality(format, axis):
    real = quantize(gaussian(384, 32), format, axis).check()
    traced = jax.eval_shape(
        lambda w: quantize(w, format, axis), jax.ShapeDtypeStruct((384, 32), jnp.float32)
    )
    planned = abstract_qtensor((384, 32), format, axis).check()
    assert traced == planned
    chex.assert_trees_all_equal_shapes_and_dtypes(real, planned)
    assert real.nbytes_packed == planned.nbytes_packed
    assert planned.shape == real.shape == (384, 32)
    assert real.widen().check().shape == (384, 32)
    assert real.widen().nbytes_packed == real.nbytes_packed
    np.testing.assert_array_equal(real.widen().dequantize(), real.dequantize())
    host = jax.tree.map(np.asarray, real).widen()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    np.testing.assert_array_equal(host.dequantize(), real.dequantize())


def test_sizes_count_nibbles_and_scales():
    assert abstract_qtensor((64, 32), "int4").nbytes_packed == 64 * 32 // 2 + 2 * 32 * 2
    assert abstract_qtensor((64, 32), "int4").bits_per_weight == 4.5
    assert abstract_qtensor((3, 64, 32), "nvfp4").nbytes_packed == 3 * (1024 + 4 * 32 + 4)
    assert abstract_qtensor((288, 32), "int1").nbytes_packed == 32 * (16 * 4 + 9 * 2)
    assert abstract_qtensor((64, 32), "int2").bits_per_weight == 2.5
    assert abstract_qtensor((7, 64, 32), "int8").nbytes_packed == 7 * (64 * 32 + 32 * 4)
    q = quantize(gaussian(64, 32), "int4")
    assert q.widen().nbytes_packed == q.nbytes_packed
    assert q.widen().values.dtype == jnp.int8
    np.testing.assert_array_equal(q.widen().dequantize(), q.dequantize())


def test_a_tree_of_shardings_and_device_put():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    q = quantize(gaussian(64, 32), "int4")
    shardings = QTensor(
        NamedSharding(mesh, P("data", "tensor")),
        NamedSharding(mesh, P("data", None, "tensor")),
        q.format,
    )
    placed = jax.device_put(q, shardings)
    assert placed.values.sharding.spec == P("data", "tensor")
    np.testing.assert_array_equal(placed.dequantize(), q.dequantize())


def test_dequantize_rounds_once():
    q = quantize(gaussian(64, 32), "int4")
    exact = np.asarray(q.dequantize(jnp.float32))
    np.testing.assert_array_equal(q.dequantize(jnp.bfloat16), exact.astype(jnp.bfloat16))


def test_check_names_what_is_wrong():
    q = quantize(gaussian(64, 32), "int4")
    assert q.check() is q
    with pytest.raises(UserError, match=r"up: int4 values \[64, 32\] need scales \[2, 1, 32\]"):
        QTensor(q.values, q.scales[:1], "int4").check("up")
    with pytest.raises(UserError, match="up: int4 values cannot be float32"):
        QTensor(gaussian(64, 32), q.scales, "int4").check("up")
    bits = quantize(gaussian(512, 4), "int1")
    with pytest.raises(UserError, match=r"up: int1 words \[8, 4\] do not hold the 512 rows"):
        QTensor(bits.values[:8], bits.scales, "int1").check("up")
    level = quantize(gaussian(64, 4), "nvfp4")
    with pytest.raises(UserError, match=r"up: nvfp4 needs tensor_scale .*, got None"):
        QTensor(level.values, level.scales, "nvfp4").check("up")
    with pytest.raises(UserError, match="K=64 is not a multiple of the rotation's 128"):
        QTensor(q.values, q.scales, "int4", rotation=128).check("up")
    with pytest.raises(UserError, match="not a quantized tensor"):
        QTensor(q.values, q.scales, "bf16").check()
