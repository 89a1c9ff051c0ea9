"""A quick count of what a training device must hold: what does not fit is never simulated.

`planner.memory` predicts it term by term in milliseconds, which is too slow for every candidate of
training; this takes microseconds, and is followed by the other for what is shown (`search.check`).
Serving asks `planner.memory` at once, which counts its weights once per mesh.

`planner.traffic` counts what lives through a step; added here is what lives for a part of it, as
XLA:TPU was seen to keep it: the largest of a layer's own and of the logits' working set. What
depends on the mesh alone is counted once per mesh.

    TrainMemory(config, profile, seq_len=4096).held(profile, batch=128, accumulate=1)
"""

from collections.abc import Mapping
from functools import lru_cache
from math import prod

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.attention import CHUNK
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.aot.target import is_torus
from tpu_stack.planner.tensors import shard_count, tensor_rows
from tpu_stack.planner.traffic import saved_activation_bytes
from tpu_stack.sharding.axes import BATCH, FFW, HEADS, KV_HEADS, LAYERS, VOCAB, TensorSpec
from tpu_stack.sharding.profiles import Profile, get_profile

BF16, F32 = 2, 4
NONE_OVER_DOTS = 3.3
"""Activations kept without remat over those of "dots": what norms, rope and gating put out, much of
it in float32. Of llama3_8b as compiled for v5p:64 on three meshes (libtpu 0.0.52)."""

Bytes = Mapping[str, float]


@lru_cache(maxsize=16)
def state_bytes_per_element(config: ModelConfig) -> Mapping[str, float]:
    """Tensor -> bytes of its weight and the optimizer's moments, per element, as training has it.

    The moments are sharded as the weight is, so that a mesh divides both alike.
    """
    train, serve = get_profile("v5e:1", "train"), get_profile("v5e:1", "serve")
    rows = tensor_rows(config, train, serve, "bf16")
    return {row.spec.name: row.state_bytes / row.spec.size for row in rows}


class TrainMemory:
    """Training on one mesh that divides every tensor."""

    def __init__(self, config: ModelConfig, profile: Profile, seq_len: int):
        self.config, self.seq_len = config, seq_len
        self.state = self.kept = layers = self.table = 0
        per_element = state_bytes_per_element(config)
        for spec in tensor_specs(config):
            kept, gathered = _elements(spec, profile)
            self.state += round(kept * per_element[spec.name])
            self.kept += kept
            if gathered == kept:
                continue
            if spec.axes[0] == LAYERS:
                layers += gathered
            elif spec.name == "unembed" or config.tie_embeddings:
                self.table = max(self.table, gathered)
        self.layer = layers // config.n_layers
        self.tables = 1 if is_torus(profile) else 2  # gathered, and its gradient in that size

    def held(self, profile: Profile, *, batch: int, accumulate: int) -> Bytes:
        """Bytes by term. `profile` is the mesh's, with a remat of its own."""
        rows = batch // accumulate // shard_count(profile, BATCH)
        logits = F32 * rows * self.seq_len * self.config.vocab_size // shard_count(profile, VOCAB)
        layer = self.layer * (2 * BF16 + F32)  # this layer's, the next one's, and its gradient
        layer += _layer_activations(self.config, profile, rows, self.seq_len)
        return {
            "weights and optimizer state": self.state,
            "bfloat16 weights": BF16 * self.kept,
            "gradient": F32 * self.kept * (2 if accumulate > 1 else 1),
            "saved activations": self._saved(profile, rows, batch // accumulate),
            "working set": max(layer, logits + self.tables * BF16 * self.table),
        }

    def _saved(self, profile: Profile, rows: int, batch: int) -> int:
        saved = saved_activation_bytes(self.config, profile, batch=batch, seq_len=self.seq_len)
        if profile.remat != "none":
            return saved
        saved = round(NONE_OVER_DOTS * saved)
        if not _chunked(self.seq_len):  # the chunked path keeps no scores, whatever the remat
            saved += self.config.n_layers * _score_bytes(self.config, profile, rows, self.seq_len)
        return saved


def _layer_activations(config: ModelConfig, profile: Profile, rows: int, length: int) -> int:
    """Bytes that one layer holds at once in training: its matmuls' results, one chunk's scores, and
    the gradient of each."""
    width = 3 * config.d_model + config.n_heads * config.head_dim // shard_count(profile, HEADS)
    width += 2 * config.n_kv_heads * config.head_dim // shard_count(profile, KV_HEADS)
    width += (2 if config.gated_mlp else 1) * config.d_ff // shard_count(profile, FFW)
    return 2 * (BF16 * rows * length * width + _score_bytes(config, profile, rows, length))


def _chunked(length: int) -> bool:
    """Whether `models.attention.attend` runs so many queries in chunks."""
    return length > CHUNK and length % CHUNK == 0


def _score_bytes(config: ModelConfig, profile: Profile, rows: int, length: int) -> int:
    """The scores that one layer of training holds at once."""
    queries = CHUNK if _chunked(length) else length
    return F32 * rows * config.n_heads // shard_count(profile, HEADS) * queries * length


def _elements(spec: TensorSpec, profile: Profile) -> tuple[int, int]:
    """Of a tensor: what a training device keeps, and what it has once gathered over the batch
    axes."""
    batch_axes = profile.rules.mesh_axes(BATCH)
    split = [name for axis in spec.axes for name in profile.rules.mesh_axes(axis)]
    kept = spec.size // prod(profile.mesh[name] for name in split)
    return kept, kept * prod(profile.mesh[name] for name in split if name in batch_axes)
