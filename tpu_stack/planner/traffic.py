"""HBM traffic, memory and model FLOPs of each program, by formula: rung 4.

The traffic is the least that has to move: what lies between two matmuls of a layer is taken to
stay on the chip, so the true figure is higher where it does not. All amounts are per JAX device.

A train step, one micro-batch:
- weights: a bfloat16 copy of the master weights is made (float32 read, bfloat16 written), then
  read by every pass: forward, backward, and once more where remat is "full";
- gathered copies: under fsdp, the gathered weights, written for forward and for backward;
- gradient, float32: under fsdp, written whole and read by the scatter; the shard, written once
  and read by the clip and by the update;
- optimizer state: master weights, mu and nu, read and written;
- activations: what remat saves per layer, written and read;
- logits, float32: written and read, and their gradient likewise.

Decode, and one run of prefill, which takes a chunk of each of a few prompts (`PrefillStep`):
- weights: every matrix once as stored, scales included; of a table, the rows looked up;
- kv cache read: the positions in sight in every layer, once; in prefill, of the mean chunk;
- kv cache write: the new positions;
- logits, float32, of one position per row: written and read.

    sum(decode_traffic(config, profile, rows, batch=16, context=4096).values())
"""

from collections.abc import Sequence
from fractions import Fraction

from jax.numpy import dtype

from tpu_stack.models.config import ModelConfig
from tpu_stack.models.flops import (
    attention_flops_per_token,
    matmul_parameters,
    mean_keys,
    train_flops_per_token,
)
from tpu_stack.planner.tensors import TensorRow, shard_count
from tpu_stack.planner.workload import PrefillStep
from tpu_stack.sharding.axes import BATCH, FFW, HEADS, KV_HEADS, VOCAB
from tpu_stack.sharding.profiles import Profile

Bytes = dict[str, int]
_F32 = 4


def train_traffic(
    config: ModelConfig, profile: Profile, rows: Sequence[TensorRow], *, batch: int, seq_len: int
) -> Bytes:
    """Bytes of one train step, one micro-batch, by term."""
    tokens = batch * seq_len // shard_count(profile, BATCH)
    compute = dtype(profile.precision.compute).itemsize
    kept = sum(row.train_elements for row in rows)
    gathered = sum(row.gathered_elements for row in rows)
    looked_up = sum(row.gathered_elements for row in rows if lookup_only(config, row))
    passes = 3 if profile.remat == "full" else 2
    table_rows = tokens * looked_up // config.vocab_size
    is_gathered = gathered > kept
    return {
        "weights": (_F32 + compute) * kept
        + compute * (passes * (gathered - looked_up) + table_rows),
        "gathered copies": 2 * compute * gathered if is_gathered else 0,
        "gradient": 3 * _F32 * kept + (2 * _F32 * gathered if is_gathered else 0),
        "optimizer state": 2 * sum(row.state_bytes for row in rows),
        "activations": 2 * saved_activation_bytes(config, profile, batch=batch, seq_len=seq_len),
        "logits": 4 * _logits_bytes(config, profile, tokens),
    }


def saved_activation_bytes(
    config: ModelConfig, profile: Profile, *, batch: int, seq_len: int
) -> int:
    """What the forward pass keeps for the backward pass, logits aside.

    remat "full": the input of every layer. "dots", and as a lower bound "none": the outputs of its
    matmuls too.
    """
    tokens = batch * seq_len // shard_count(profile, BATCH)
    width = config.d_model
    if profile.remat != "full":
        heads = config.n_heads * config.head_dim // shard_count(profile, HEADS)
        kv_heads = config.n_kv_heads * config.head_dim // shard_count(profile, KV_HEADS)
        hidden = (2 if config.gated_mlp else 1) * config.d_ff // shard_count(profile, FFW)
        width += heads + 2 * kv_heads + config.d_model + hidden + config.d_model
    return config.n_layers * tokens * width * dtype(profile.precision.compute).itemsize


def prefill_traffic(
    config: ModelConfig, profile: Profile, rows: Sequence[TensorRow], step: PrefillStep
) -> Bytes:
    """Bytes of one run of the prefill program."""
    seen = sum((_positions_in_sight(config, end, step.chunk) for end in step.ends), Fraction())
    read = step.filled * seen / len(step.ends)
    return _serve_traffic(config, profile, rows, step.filled, read, step.tokens)


def decode_traffic(
    config: ModelConfig, profile: Profile, rows: Sequence[TensorRow], *, batch: int, context: int
) -> Bytes:
    """Bytes of one more token for every row, each with a full context."""
    local = batch // shard_count(profile, BATCH)
    seen = local * _positions_in_sight(config, context, 1)
    return _serve_traffic(config, profile, rows, local, seen, local)


def _serve_traffic(
    config: ModelConfig,
    profile: Profile,
    tensors: Sequence[TensorRow],
    rows: int,
    read: Fraction,
    tokens: int,
) -> Bytes:
    """Of `tokens` new tokens, of `rows` sequences that see `read` positions together."""
    position = config.n_layers * _position_bytes(config, profile)
    return {
        "weights": _served_weights(config, tensors, tokens=tokens),
        "kv cache read": int(position * read),
        "kv cache write": position * tokens,
        "logits": 2 * _logits_bytes(config, profile, rows),
    }


def _positions_in_sight(config: ModelConfig, end: int, tokens: int) -> Fraction:
    """Positions that the `tokens` before `end` see, the mean over the layers."""
    local = min(end, config.window + tokens - 1)
    seen = [local if kind == "local" else end for kind in config.layer_kinds]
    return Fraction(sum(seen), config.n_layers)


def _position_bytes(config: ModelConfig, profile: Profile) -> int:
    """Of a position's key and value in one layer."""
    heads = config.n_kv_heads // shard_count(profile, KV_HEADS)
    itemsize = dtype(profile.precision.cache or profile.precision.compute).itemsize
    return 2 * heads * config.head_dim * itemsize


def train_memory(
    config: ModelConfig, profile: Profile, rows: Sequence[TensorRow], *, batch: int, seq_len: int
) -> Bytes:
    """What a training device must hold at once, temporaries of a layer aside."""
    tokens = batch * seq_len // shard_count(profile, BATCH)
    kept = sum(row.train_elements for row in rows)
    return {
        "weights and optimizer state": sum(row.state_bytes for row in rows),
        "bfloat16 weights": kept * dtype(profile.precision.compute).itemsize,
        "gradient": _F32 * kept,
        "saved activations": saved_activation_bytes(config, profile, batch=batch, seq_len=seq_len),
        "logits and their gradient": 2 * _logits_bytes(config, profile, tokens),
    }


def train_model_flops(config: ModelConfig, *, batch: int, seq_len: int) -> float:
    """FLOPs of the model, all devices: causal attention, nothing recomputed."""
    return batch * seq_len * train_flops_per_token(config, seq_len)


def prefill_model_flops(config: ModelConfig, step: PrefillStep) -> float:
    """The same for the mean run of the prefill program, with the logits of a prompt's last token
    only."""
    unembed = config.d_model * config.vocab_size
    attention = attention_flops_per_token(config, mean_keys(config, step.prompt))
    per_token = 2 * (matmul_parameters(config) - unembed) + attention
    return step.tokens * (per_token + 2 * unembed / step.prompt)


def decode_model_flops(config: ModelConfig, *, batch: int, context: int) -> float:
    """The same for one token per row that sees a full context."""
    keys = {"global": float(context), "local": float(min(config.window, context))}
    return batch * (2 * matmul_parameters(config) + attention_flops_per_token(config, keys))


def lookup_only(config: ModelConfig, row: TensorRow) -> bool:
    """Whether the tensor is a table that is read by row and never multiplied."""
    return row.spec.name == "embed" and not config.tie_embeddings


def _served_weights(config: ModelConfig, rows: Sequence[TensorRow], tokens: int) -> int:
    read = sum(row.serve_bytes for row in rows if not lookup_only(config, row))
    table = next(row.serve_bytes for row in rows if row.spec.name == "embed")
    return read + table * tokens // config.vocab_size


def _logits_bytes(config: ModelConfig, profile: Profile, tokens: int) -> int:
    return _F32 * tokens * config.vocab_size // shard_count(profile, VOCAB)
