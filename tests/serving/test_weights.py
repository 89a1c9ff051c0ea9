"""Weights in process: bit for bit what packing and opening gives, and cheap to ask for again."""

import dataclasses
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from serving_model import MODEL, serving

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import build_tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import map_specs, tensor_of, tensor_specs
from tpu_stack.models.decoder import forward, init_params
from tpu_stack.models.per_layer import PerLayer
from tpu_stack.quant.formats import FORMATS
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.quantize import quantize
from tpu_stack.quant.transposed import Transposed
from tpu_stack.serving import weights as weights_module
from tpu_stack.serving.bundle import Bundle
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.pack import pack
from tpu_stack.serving.weights import engine_weights, prepare
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

DENSE = MODEL
MIXTURE = dataclasses.replace(MODEL, n_experts=4, experts_per_token=2, d_ff_shared=128)
CONFIGS = {"dense": DENSE, "mixture": MIXTURE}
SINGLE, EIGHT = "data=1", "data=2,tensor=4"
QUICK = {("dense", "float32"), ("dense", "int8"), ("dense", "nvfp4"), ("mixture", "int4")}


def trained_params(config):
    """Random float32 parameters on a training mesh of eight devices."""
    profile = get_profile("8t").with_mesh("data=2,fsdp=2,tensor=2")
    mesh = make_mesh(profile.mesh)
    shardings = map_specs(
        config, lambda spec: NamedSharding(mesh, profile.rules.partition_spec(spec.axes, spec.name))
    )
    return jax.device_put(init_params(config, jax.random.key(3)), shardings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each model its parameters, and a run folder with their checkpoint."""
    tokenizer = build_tokenizer("chars", [Document("abcdefgh", "text")])
    found = {}
    for name, config in CONFIGS.items():
        params, run = trained_params(config), tmp_path_factory.mktemp(name)
        with CheckpointStore(run) as store:
            meta = {"model": config.to_dict(), "tokenizer": tokenizer.to_json()}
            store.save(0, {"params": params}, meta)
        found[name] = params, run
    return found


def assert_identical(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        assert one.sharding == other.sharding, where
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), where


def mesh_for(format: str, mesh: str) -> str:
    """Words of one-bit values hold 256 rows, more than a quarter of any of these."""
    return "data=8" if FORMATS[format].kind == "bits" and mesh == EIGHT else mesh


EVERY_CASE = [
    pytest.param(model, format, mesh, marks=() if (model, format) in QUICK else pytest.mark.slow)
    for model in CONFIGS
    for format in FORMATS
    for mesh in (SINGLE, EIGHT)
    if "_g" not in format
]


@pytest.mark.parametrize(("model", "format", "mesh"), EVERY_CASE)
def test_in_process_equals_through_disk(runs, tmp_path, model, format, mesh):
    params, run = runs[model]
    profile, devices = serving(mesh_for(format, mesh))
    pack(run, format, profile, devices, tmp_path / "bundle")
    wanted = Bundle.open(tmp_path / "bundle").load(profile, devices, split=True)
    found = engine_weights(CONFIGS[model], params, format, profile, devices)
    assert_identical(found, wanted)
    assert_identical(prepare(CONFIGS[model], found, devices), found)  # an engine takes it as it is


@pytest.mark.parametrize("mesh", [SINGLE, EIGHT])
def test_rotated(runs, tmp_path, mesh):
    params, run = runs["dense"]
    profile, devices = serving(mesh)
    pack(run, "mxfp4", profile, devices, tmp_path / "bundle", rotation=16)
    wanted = Bundle.open(tmp_path / "bundle").load(profile, devices, split=True)
    assert_identical(engine_weights(DENSE, params, "mxfp4", profile, devices, 16), wanted)


def test_it_is_what_quantize_gives(runs):
    """On one device: each layer quantized by itself, widened, transposed."""
    params, _ = runs["dense"]
    profile, mesh = serving(SINGLE)
    found = engine_weights(DENSE, params, "int8", profile, mesh)["blocks"]["mlp"]["w_up"]
    assert isinstance(found, PerLayer)
    for layer, held in enumerate(found.layers):
        assert isinstance(held, Transposed)
        wanted = quantize(np.asarray(params["blocks"]["mlp"]["w_up"][layer]), "int8")
        np.testing.assert_array_equal(held.stored.values.T, wanted.values)
        np.testing.assert_array_equal(held.stored.scales.T, wanted.scales[0])


@pytest.mark.parametrize(("model", "mesh"), [("dense", SINGLE), ("mixture", EIGHT)])
def test_the_second_call_compiles_nothing(runs, model, mesh):
    params, _ = runs[model]
    profile, devices = serving(mesh)
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    engine_weights(CONFIGS[model], params, "int4", profile, devices)
    newer = jax.tree.map(lambda x: x + 1, params)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(jax.jit(lambda x: x * 3.25)(1.0))
        assert compiled, "the listener hears of compilations"
        compiled.clear()
        engine_weights(CONFIGS[model], newer, "int4", profile, devices)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("format", ["float32", "int4"])
def test_the_next_train_step_may_donate_the_parameters(format):
    """Nothing that an engine holds shares memory with them."""
    profile, mesh = serving(SINGLE)
    params = jax.device_put(init_params(DENSE, jax.random.key(0)), mesh.devices.flat[0])
    held = engine_weights(DENSE, params, format, profile, mesh)
    before = jax.tree.map(np.array, held)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    jax.block_until_ready(step(params))
    jax.tree.map(np.testing.assert_array_equal, held, before)


def test_replicas_on_virtual_devices_share_memory(runs):
    params, _ = runs["dense"]
    profile, mesh = serving("data=8")
    held = engine_weights(DENSE, params, "int4", profile, mesh)
    for leaf in jax.tree.leaves(held):
        places = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8
        assert len(places) == 1


def test_a_mesh_of_real_devices_quantizes_on_it(runs, monkeypatch):
    """As on a TPU: each device quantizes its shard, and nothing is widened or transposed.

    Partitioned programs round elsewhere, so that of two scales with the same error either may win:
    what is compared is the error.
    """
    params, _ = runs["dense"]
    profile, mesh = serving("tensor=4")
    monkeypatch.setattr(weights_module, "_on_cpu", lambda mesh: False)
    found = engine_weights(DENSE, params, "int4", profile, mesh)
    target = PackedLayout.of(DENSE, "int4", profile, mesh).abstract
    quantized = 0
    for spec in tensor_specs(DENSE):
        assert weights_module.work_sharding(spec, profile, mesh).num_devices == 4
        split = tensor_of(found, spec.name)
        for layer, held in enumerate(split.layers if isinstance(split, PerLayer) else ()):
            assert not isinstance(held, Transposed)
            if not isinstance(held, QTensor):
                continue
            quantized += 1
            assert held.values.dtype == jnp.int4
            placed = tensor_of(target, spec.name).values.sharding.spec
            assert held.values.sharding.spec == PartitionSpec(*placed[1:])
            weight = np.asarray(tensor_of(params, spec.name)[layer])
            errors = [
                np.square(np.asarray(q.dequantize()) - weight).sum()
                for q in (held, quantize(weight, "int4"))
            ]
            np.testing.assert_allclose(*errors, rtol=1e-4)
    assert quantized == 7 * DENSE.n_layers


def test_the_logits_are_those_of_the_parameters(runs):
    params, _ = runs["dense"]
    profile, mesh = serving(SINGLE)
    held = engine_weights(DENSE, params, "float32", profile, mesh)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    wanted = forward(DENSE, jax.device_put(params, mesh.devices.flat[0]), tokens)
    np.testing.assert_allclose(forward(DENSE, held, tokens), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["float32", "int4"])
def test_a_source_is_asked_for_one_tensor_at_a_time(format):
    """Nothing of ours holds one when the next is made, so that the host never holds two.

    XLA:CPU's thread lets go a moment after the program that read a tensor has ended, and jaxlib
    drops what its threads let go of at the next call into it.
    """
    made: list[weakref.ref] = []
    alive: list[int] = []

    def held() -> int:
        return sum(reference() is not None for reference in made)

    def source(spec):
        deadline = time.monotonic() + 10
        while held() and time.monotonic() < deadline:
            jax.block_until_ready(jax.device_put(0.0))
        alive.append(held())
        tensor = np.full(spec.shape, 0.5, np.float32)
        made.append(weakref.ref(tensor))
        return tensor

    engine_weights(DENSE, source, format, *serving(SINGLE))
    assert alive == [0] * len(tensor_specs(DENSE))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(runs, bad):
    params, _ = runs["dense"]
    params = jax.tree.map(lambda x: x, params)
    params["blocks"]["mlp"]["w_up"] = params["blocks"]["mlp"]["w_up"].at[1, 2, 3].set(bad)
    with pytest.raises(UserError, match=r"blocks\.mlp\.w_up: 1 of .* at \[1, 2, 3\]"):
        engine_weights(DENSE, params, "int4", *serving(SINGLE))


def test_refusals(runs):
    params, _ = runs["dense"]
    with pytest.raises(UserError, match="unknown weight format 'int5'"):
        engine_weights(DENSE, params, "int5", *serving(SINGLE))
    with pytest.raises(UserError, match=r"wk: axis 'kv_heads' has 4 parts"):
        engine_weights(DENSE, params, "int8", *serving("tensor=8"))
