"""What prefill and decode hold: packed weights, the cache and its copy, one layer's activations.

The cache is donated, yet the compiler updates a copy in another layout (libtpu 0.0.52: `copy` of
the whole [L, B, S, K, H] before the layers' loop, and back after it), so it counts twice.

>>> predict_serve(request).at_most[0].name
'kv cache'
"""

from math import prod
from typing import Any

import jax

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.attention import CHUNK
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.aot.target import PROXY
from tpu_stack.planner.memory.prediction import Prediction, Term, array, axes_text, local, shard
from tpu_stack.planner.memory.tiles import padded_bytes
from tpu_stack.planner.tensors import ways
from tpu_stack.quant.policy import stored_format
from tpu_stack.quant.qtensor import abstract_qtensor
from tpu_stack.serving.layout import scales_spec
from tpu_stack.sharding.axes import BATCH, FFW, HEADS, KV_HEADS, LAYERS, VOCAB, TensorSpec
from tpu_stack.sharding.profiles import Profile

CACHE_AXES = (None, BATCH, None, KV_HEADS, None)
CODE_BYTES = 9 * 2**20
"""The program: 2 to 11 MiB over the cases that were compiled; it follows no size of the model."""


MASK_IN_PRODUCT = ("v5p",)
"""Chips whose compiler was seen to mask scores inside the product that makes them; v6e's was seen
not to. Of the others no prefill was compiled: they are taken for the larger (libtpu 0.0.52)."""


def predict_serve(request: CompileRequest) -> Prediction:
    """The terms of prefill or decode of `request`."""
    config, profile = request.config, request.profile
    tokens = 1 if request.program == "decode" else request.prompt
    sizes = (config.n_layers, request.batch, request.context, config.n_kv_heads, config.head_dim)
    cache = shard(sizes, CACHE_AXES, profile)
    owner = f"{config.n_layers} layers, {axes_text((BATCH, KV_HEADS), profile)}"
    kept = array("kv cache", "bfloat16", cache, owner, 2)
    copy = array("kv cache, the copy that is updated", "bfloat16", cache, owner, 2)
    given = [_weights(request, spec) for spec in tensor_specs(config)]
    layers = sum(size for size, spec in given if spec.axes[0] == LAYERS)
    tables = sum(size for size, _ in given) - layers
    split = axes_text((VOCAB, HEADS), profile)
    always = (
        Term("weights of the layers", layers, request.format, f"all layers, {split}", True),
        Term("embedding tables", tables, request.format, split, True),
        Term(kept.name, kept.bytes, kept.shape, kept.owner, True),
        copy,
    )
    return Prediction(
        always,
        {
            "attention": _attention(request, tokens),
            "MLP": _mlp(request, tokens),
            "sampling": _sampling(request),
        },
        CODE_BYTES,
    )


def _weights(request: CompileRequest, spec: TensorSpec) -> tuple[int, TensorSpec]:
    """Bytes of a tensor as it is stored on a device, scales and padding included."""
    profile, fmt = request.profile, stored_format(spec, request.format)
    if not fmt.quantized:
        return padded_bytes(local(spec, profile), fmt.bits), spec
    packed = abstract_qtensor(spec.shape, fmt.name, spec.contract_axis or -2, name=spec.name)
    values = shard(packed.values.shape, spec.axes, profile)
    scales = _split(packed.scales.shape, scales_spec(spec, packed, profile), profile)
    bits = 32 if packed.packed_bits else fmt.bits
    size = padded_bytes(values, bits) + padded_bytes(scales, fmt.scale_bits)
    level: Any = packed.tensor_scale
    return size + (padded_bytes(level.shape, 32) if level is not None else 0), spec


def _split(
    shape: tuple[int, ...], spec: jax.sharding.PartitionSpec, profile: Profile
) -> tuple[int, ...]:
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(
        size // prod(profile.mesh[name] for name in axes)
        for size, axes in zip(shape, names, strict=True)
    )


def _attention(request: CompileRequest, tokens: int) -> tuple[Term, ...]:
    """One layer's attention of `tokens` of each row over the whole cache.

    Two arrays of scores, the masked products and their softmax, where masking is part of the
    product; elsewhere four, and a mask: the products unmasked and a masking value of that size.
    """
    config, profile = request.config, request.profile
    rows = request.batch // ways(profile, BATCH)
    queries = CHUNK if tokens > CHUNK and tokens % CHUNK == 0 else tokens
    scores = (rows, config.n_heads // ways(profile, HEADS), queries, request.context)
    split = f"one layer, {axes_text((BATCH, HEADS), profile)}"
    fused = PROXY.get(profile.chip, profile.chip) in MASK_IN_PRODUCT
    mask = () if fused else (array("mask, as large as the scores", "bool", scores, split),)
    return (
        array("attention scores", "float32", scores, split, 2 if fused else 4),
        *mask,
        array("hidden states", "bfloat16", (rows, tokens, config.d_model),
              axes_text((BATCH,), profile)),
    )  # fmt: skip


def _mlp(request: CompileRequest, tokens: int) -> tuple[Term, ...]:
    """One layer's MLP over `tokens` of each row."""
    config, profile = request.config, request.profile
    rows, split = request.batch // ways(profile, BATCH), axes_text((BATCH,), profile)
    ffw = (rows, tokens, config.d_ff // ways(profile, FFW))
    wide = f"one layer, {axes_text((BATCH, FFW), profile)}"
    return (
        array("MLP widths", "bfloat16", ffw, wide, 3 if config.gated_mlp else 2),
        array("hidden states", "bfloat16", (rows, tokens, config.d_model), split, 3),
    )


def _sampling(request: CompileRequest) -> tuple[Term, ...]:
    """Whole rows of logits, sorted with their tokens' numbers."""
    rows = request.batch // ways(request.profile, BATCH)
    shape, split = (rows, request.config.vocab_size), axes_text((BATCH,), request.profile)
    return (
        array("logits, gathered and sorted", "float32", shape, split),
        array("tokens, sorted", "int32", shape, split),
    )
