"""A model's products where each device runs the kernel on its part: the compiler's numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import forward, init_params
from tpu_stack.quant import quantize, use_implementation
from tpu_stack.quant.policy import stored_format
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile

MODEL = ModelConfig(
    vocab_size=128, d_model=128, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=16, d_ff=256
)
TOKENS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 6)).astype(np.int32)


def packed(format: str, mesh: str, config: ModelConfig = MODEL):
    profile = get_profile("8i").with_mesh(mesh)
    devices = make_mesh(profile.mesh)
    params = init_params(config, jax.random.key(0))

    def one(spec):
        fmt = stored_format(spec, format)
        value = tensor_of(params, spec.name)
        if not fmt.quantized:
            return value.astype(fmt.dtype)
        return quantize(value, fmt, spec.contract_axis, name=spec.name)

    layout = PackedLayout.of(config, format, profile, devices)
    return jax.device_put(map_specs(config, one), layout.shardings), profile, devices


def splits(traced) -> int:
    return str(traced.jaxpr).count("shard_map[")


@pytest.mark.parametrize(
    ("format", "mesh", "tied"),
    [
        ("int4", "tensor=4", True),
        ("int8", "data=2,tensor=2", False),
        *(
            pytest.param(name, "tensor=4", True, marks=pytest.mark.slow)
            for name in ("int8", "mxfp4")
        ),
        *(
            pytest.param(name, "data=2,tensor=2", False, marks=pytest.mark.slow)
            for name in ("int4", "mxfp4")
        ),
    ],
)
def test_the_kernel_on_every_device_gives_the_logits_of_the_compiler(format, mesh, tied):

    config = dataclasses.replace(MODEL, tie_embeddings=tied)
    params, profile, devices = packed(format, mesh, config)
    run = jax.jit(lambda params, tokens: forward(config, params, tokens))
    with sharding_scope(devices, profile.rules):
        with use_implementation("xla"):
            want = np.asarray(run(params, TOKENS))
            assert splits(run.trace(params, TOKENS)) == 0
        with use_implementation("pallas"):
            got = run(params, TOKENS)
            # Seven products in the scanned layer, and the logits'.
            assert splits(run.trace(params, TOKENS)) == 8
    error = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
    assert error <= 1e-5, error
