"""Weights in layers give what stacked ones do, keep their layout, and are copied nowhere."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tpu_stack.models.decoder import forward, init_params
from tpu_stack.models.per_layer import PerLayer, is_split, per_layer
from tpu_stack.models.presets import get_preset
from tpu_stack.quant import quantize
from tpu_stack.sharding.mesh import make_mesh

CONFIG = dataclasses.replace(
    get_preset("nano"), vocab_size=64, d_model=64, n_layers=3, d_ff=128, max_seq_len=64
)
LOCAL = dataclasses.replace(CONFIG, block_pattern=("local", "global"), window=8)
MIXTURE = dataclasses.replace(CONFIG, n_experts=4, experts_per_token=2, d_ff=64)


@pytest.mark.parametrize("config", [CONFIG, LOCAL, MIXTURE], ids=["plain", "windows", "mixture"])
def test_the_logits_are_those_of_a_scan(config):
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, config.vocab_size)
    run = jax.jit(partial(forward, config))
    stacked, split = run(params, tokens), run(per_layer(params), tokens)
    np.testing.assert_allclose(split, stacked, rtol=1e-5, atol=1e-5)


def test_quantized_weights_split_into_quantized_layers():
    weight = quantize(jax.random.normal(jax.random.key(0), (3, 64, 32)), "nvfp4")
    split = per_layer({"blocks": {"w": weight}})["blocks"]["w"]
    assert isinstance(split, PerLayer)
    for layer, each in enumerate(split.layers):
        np.testing.assert_array_equal(each.check().dequantize(), weight.dequantize()[layer])


def test_splitting_twice_changes_nothing_and_tables_stay_whole():
    params = per_layer(init_params(CONFIG, jax.random.key(0)))
    assert is_split(params)
    assert not is_split(params["embed"])
    again = per_layer(params)
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_layers_keep_the_layout_of_their_weight():
    mesh = make_mesh({"tensor": 4})
    weight = jax.device_put(
        jnp.ones((3, 8, 16)), NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
    )
    for each in per_layer({"blocks": {"w": weight}})["blocks"]["w"].layers:
        assert each.sharding.spec == PartitionSpec(None, "tensor")
        assert each.addressable_shards[0].data.shape == (8, 4)


def test_layers_of_weights_on_no_mesh_may_go_to_any():
    (split, *_) = per_layer({"blocks": {"w": jnp.ones((2, 8, 16))}})["blocks"]["w"].layers
    assert not split.committed
    mesh = make_mesh({"tensor": 2})
    whole = jax.device_put(jnp.ones(16), NamedSharding(mesh, PartitionSpec()))
    assert jax.jit(jnp.dot)(split, whole).shape == (8,)


def test_abstract_weights_split_as_arrays_do():
    mesh = make_mesh({"tensor": 4})
    place = NamedSharding(mesh, PartitionSpec(None, "tensor", None))
    weight = jax.device_put(quantize(jnp.ones((3, 64 * 4, 32)), "int4"), place)
    plain = jnp.ones((3, 5))
    made = {"q": weight, "plain": plain}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made
    )
    want = per_layer({"blocks": made})["blocks"]
    found = per_layer({"blocks": abstract})["blocks"]
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for each, other in zip(jax.tree.leaves(found["q"]), jax.tree.leaves(want["q"]), strict=True):
        assert isinstance(each, jax.ShapeDtypeStruct)
        assert (each.shape, each.dtype) == (other.shape, other.dtype)
        assert each.sharding.spec == other.sharding.spec
    assert found["plain"].layers[0].shape == (5,)


def test_no_layer_is_copied_out_of_a_stack():
    """What a scan does to every weight of every layer, and serving must not."""
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jnp.zeros((2, 32), jnp.int32)
    layer = f"f32[1,{CONFIG.d_model},{CONFIG.d_ff}]"

    def slices(params) -> int:
        text = jax.jit(partial(forward, CONFIG)).lower(params, tokens).compile().as_text()
        lines = (text or "").splitlines()
        return sum(layer in line and "dynamic-slice(" in line for line in lines)

    assert slices(params) > 0
    assert slices(per_layer(params)) == 0
