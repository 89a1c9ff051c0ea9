"""Mixtures of experts through the engine: a plain forward pass's tokens, alone and on a mesh."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_model import CONFIG, LENGTH, PAGE, ask, finish, prompt_of, tokens_of
from serving_model import serving

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.decoder import forward, init_params
from tpu_stack.quant.policy import stored_format
from tpu_stack.quant.quantize import quantize
from tpu_stack.serving.engine.engine import Engine
from tpu_stack.serving.engine.programs import Programs
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.requests import GenerationRequest

MIXTURE = dataclasses.replace(CONFIG, n_experts=4, experts_per_token=2, d_ff=128)
SHAPES = Shapes(8, LENGTH, PAGE, 64, (64,), (1,))
REQUESTS = [GenerationRequest(prompt_of(length, length), 16) for length in (3, 40, 90)]


@cache
def weights(format: str):
    """Sharp choices, so that tokens differ; quantized as `pack` would."""
    params = jax.tree.map(lambda x: 3 * x, init_params(MIXTURE, jax.random.key(0)))

    def one(spec):
        weight = tensor_of(params, spec.name)
        fmt = stored_format(spec, format)
        if not fmt.quantized:
            return weight
        return quantize(weight, fmt, spec.contract_axis).widen()

    return params if format == "float32" else map_specs(MIXTURE, one)


@cache
def expected(format: str) -> list[list[int]]:
    """Greedy tokens, each from a whole pass over all tokens before it."""
    run = jax.jit(partial(forward, MIXTURE))
    tokens = np.zeros((len(REQUESTS), 128), np.int32)
    lengths = np.array([len(request.prompt) for request in REQUESTS])
    for row, request in enumerate(REQUESTS):
        tokens[row, : lengths[row]] = request.prompt
    for step in range(16):
        logits = np.asarray(run(weights(format), jnp.asarray(tokens)))
        places = lengths + step
        tokens[np.arange(len(REQUESTS)), places] = logits[
            np.arange(len(REQUESTS)), places - 1
        ].argmax(-1)
    return [tokens[row, n : n + 16].tolist() for row, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("format", "mesh"),
    [
        pytest.param("float32", "tensor=1", marks=pytest.mark.slow),
        ("int8", "expert=2,tensor=2"),
        pytest.param("float32", "expert=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("int8", "tensor=1", marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_a_full_pass(format, mesh):
    profile, devices = serving(mesh, float32=True)
    programs = Programs(MIXTURE, profile, devices, SHAPES)
    stored = "bf16" if format == "float32" else format
    layout = PackedLayout.of(MIXTURE, stored, profile, devices)

    def placed(spec):
        target = tensor_of(layout.abstract, spec.name)
        return jax.tree.map(
            lambda part, like: jax.device_put(part, like.sharding),
            tensor_of(weights(format), spec.name),
            target if not hasattr(target, "values") else _like(target, spec.name, format),
        )

    params = programs.prepared(map_specs(MIXTURE, placed))
    programs.warm_up(params)
    target = Engine(programs, params)
    asked = [ask(target, request)[1] for request in REQUESTS]
    finish(target)
    assert [tokens_of(events) for events in asked] == expected(format)
    assert len({tuple(tokens) for tokens in expected(format)}) == 3


def _like(target, name: str, format: str):
    """The layout with the parts that a widened weight has."""
    widened = tensor_of(weights(format), name)
    return dataclasses.replace(
        widened, values=target.values, scales=target.scales, tensor_scale=None
    )
