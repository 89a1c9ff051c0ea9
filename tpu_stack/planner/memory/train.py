"""What a train step holds: state, saved activations, and the larger of the loss and one layer.

With the layers in a scan, memory is highest either where the logits are or in the backward pass of
one layer. Between the two, the compiler's heap reuses what it can.

    predict_train(request).moment  # 'loss'
"""

from math import prod

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.attention import CHUNK
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.aot.target import PROXY, is_torus
from tpu_stack.planner.memory.prediction import Prediction, Term, array, axes_text, local, shard
from tpu_stack.planner.memory.tiles import padded_bytes
from tpu_stack.planner.tensors import shard_count
from tpu_stack.sharding.axes import BATCH, EMBED, FFW, HEADS, KV_HEADS, LAYERS, VOCAB
from tpu_stack.sharding.profiles import Profile

CODE_BYTES = 40 * 2**20
"""The program: 21 to 67 MiB over the cases that were compiled; it follows no size of the model."""
SPLIT_LOGITS_GRADIENT = ("7x",)
"""Chips whose compiler writes the logits' gradient out in bfloat16 beside the float32 logits,
where the others' computes it inside both products that read it (libtpu 0.0.52)."""


def predict_train(request: CompileRequest) -> Prediction:
    """The terms of a train step of `request`."""
    config, profile = request.config, request.profile
    rows = request.batch // request.accumulate // shard_count(profile, BATCH)
    size = (rows, request.seq_len)
    held = _weights_held(request)
    saved = _saved(config, profile, size)
    return Prediction(
        always=(*_arguments(request), *held, *saved),
        moments={
            "loss": _loss(config, profile, size),
            "layer, backward": _layer(config, profile, size),
        },
        code=CODE_BYTES,
    )


def _arguments(request: CompileRequest) -> list[Term]:
    config, profile = request.config, request.profile
    specs = tensor_specs(config)
    bytes_ = sum(padded_bytes(local(spec, profile), 32) for spec in specs)
    count = f"{sum(prod(local(spec, profile)) for spec in specs):,} float32"
    split = axes_text((EMBED, FFW), profile)
    rows = (request.batch // shard_count(profile, BATCH), request.seq_len)
    batch = 4 * padded_bytes(rows, 32) + padded_bytes(rows, 8)
    where = axes_text((BATCH,), profile)
    return [
        Term("parameters", bytes_, count, f"all layers, {split}", True),
        Term("optimizer state", 2 * bytes_, f"2 x {count}", f"all layers, {split}", True),
        Term("batch", batch, f"4 x int32{list(rows)}, bool", where, True),
    ]


def _weights_held(request: CompileRequest) -> list[Term]:
    """The bfloat16 copies of the layers' weights, cast once a step before the scan, and the sum of
    gradients over micro-batches. The tables' copies are among the loss's terms."""
    profile, specs = request.profile, tensor_specs(request.config)
    layers = [spec for spec in specs if spec.axes[0] == LAYERS]
    split = axes_text((EMBED, FFW), profile)
    cast = sum(padded_bytes(local(spec, profile), 16) for spec in layers)
    held = [Term("bfloat16 weights", cast, "stacked, cast once", f"all layers, {split}")]
    if request.accumulate > 1:
        sums = sum(padded_bytes(local(spec, profile), 32) for spec in specs)
        held.append(Term("summed gradients", sums, "float32", f"all tensors, {split}"))
    return held


def _saved(config: ModelConfig, profile: Profile, size: tuple[int, int]) -> list[Term]:
    """What the forward pass keeps of every layer: its input; with "dots" every product's result
    too; without remat also what lies between products."""
    split, L = axes_text((BATCH,), profile), config.n_layers
    terms = [
        array("saved layer inputs", "bfloat16", (L, *size, config.d_model), f"{L} layers, {split}")
    ]
    if profile.remat == "full":
        return terms
    wide = axes_text((BATCH, FFW), profile)
    names = {"queries": (HEADS, config.n_heads * config.head_dim, 1),
             "keys and values": (KV_HEADS, config.n_kv_heads * config.head_dim, 2),
             "attention and MLP outputs": (None, config.d_model, 2),
             "MLP widths": (FFW, config.d_ff, 2 if config.gated_mlp else 1)}  # fmt: skip
    again = 2 if profile.remat == "none" else 1  # before and after norm, rotation or activation
    for name, (axis, width, count) in names.items():
        shape = (L, *size, width // shard_count(profile, axis))
        terms.append(
            array(f"saved {name}", "bfloat16", shape, f"{L} layers, {wide}", count * again)
        )
    if profile.remat == "none" and not _chunked(size[1]):
        heads = config.n_heads // shard_count(profile, HEADS)
        shape = (L, size[0], heads, size[1], size[1])
        terms.append(array("saved attention weights", "bfloat16", shape, f"{L} layers, {wide}"))
    return terms


def _loss(config: ModelConfig, profile: Profile, size: tuple[int, int]) -> tuple[Term, ...]:
    """At the logits. The table that makes them is gathered over fsdp, and its gradient is made in
    that size before it is scattered. On an open grid the heap has room for both; on a torus, where
    all-gathers take the place of all-reduces, one takes the other's place (llama3_8b on v5p:4x4x4,
    libtpu 0.0.52)."""
    V, D = config.vocab_size // shard_count(profile, VOCAB), config.d_model
    split = axes_text((BATCH, VOCAB), profile)
    terms = [array("logits", "float32", (*size, V), split)]
    chip = PROXY.get(profile.chip, profile.chip)
    if chip in SPLIT_LOGITS_GRADIENT:
        terms.append(array("gradient of the logits", "bfloat16", (*size, V), split))
    table = axes_text((VOCAB,), profile)
    gathered = shard_count(profile, EMBED) > 1
    both = gathered and not is_torus(profile)
    name = "unembedding, gathered, and its gradient" if both else "unembedding"
    terms.append(array(name, "bfloat16", (V, D), table, 2 if both else 1))
    if gathered:
        piece = shard((config.vocab_size, D), (VOCAB, EMBED), profile)
        terms.append(array("pieces of that gradient", "bfloat16", piece, table))
    terms.append(array("last hidden states", "float32", (*size, D), axes_text((BATCH,), profile)))
    return tuple(terms)


def _layer(config: ModelConfig, profile: Profile, size: tuple[int, int]) -> tuple[Term, ...]:
    """One layer's backward pass: its scores and activations made again, the gradients so far."""
    rows, length = size
    split, wide = axes_text((BATCH, HEADS), profile), axes_text((BATCH, FFW), profile)
    heads = config.n_heads // shard_count(profile, HEADS)
    queries = CHUNK if _chunked(length) else length
    specs = tensor_specs(config)
    stacked = [spec for spec in specs if spec.axes[0] == LAYERS]
    grads = sum(padded_bytes(local(spec, profile), 16) for spec in specs)
    kept = prod(profile.mesh[name] for name in profile.rules.mesh_axes(EMBED))
    gathered = sum(prod(local(s, profile)) * kept for s in stacked) // config.n_layers
    all_axes = axes_text((EMBED, FFW), profile)
    D, F = config.d_model, config.d_ff // shard_count(profile, FFW)
    terms = [
        Term("gradients", grads, "bfloat16, stacked", f"all layers, {all_axes}"),
        array("attention scores", "float32", (rows, heads, queries, length), f"one layer, {split}"),
        array("attention weights", "bfloat16", (rows, heads, queries, length),
              f"one layer, {split}"),
        array("MLP widths and gradients", "bfloat16", (rows, length, F), f"one layer, {wide}", 4),
        array("hidden states and gradients", "bfloat16", (rows, length, D),
              f"one layer, {axes_text((BATCH,), profile)}", 4),
        array("mask", "bool", (rows, length, length), axes_text((BATCH,), profile)),
    ]  # fmt: skip
    if kept > 1:
        terms.append(Term("gathered weights and gradients", 2 * 2 * gathered, "2 x bfloat16",
                          f"one layer, {axes_text((FFW,), profile)}"))  # fmt: skip
    return tuple(terms)


def _chunked(length: int) -> bool:
    """Whether `models.attention.attend` runs so many queries in chunks."""
    return length > CHUNK and length % CHUNK == 0
