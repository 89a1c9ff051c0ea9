"""Matmul FLOPs of a model from its config, by the usual count of two per multiply-add.

>>> train_flops_per_token(get_preset("llama3_8b"), seq_len=8192) / 1e9
51.471187968
"""

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.axes import EXPERT, TensorSpec


def matmul_parameters(config: ModelConfig) -> int:
    """Parameters that a token is multiplied by: all matrices, the unembedding once.

    An embedding that is only looked up does not count; a tied one counts once, as unembedding. Of
    the experts those count that a token is sent to.
    """
    counted = 0
    for spec in tensor_specs(config):
        lookup_only = spec.name == "embed" and not config.tie_embeddings
        if spec.contract_axis is not None and not lookup_only:
            counted += active_size(spec, config)
        elif spec.name.endswith(".router"):
            counted += spec.size
    return counted


def active_size(spec: TensorSpec, config: ModelConfig) -> int:
    """Elements of a tensor that one token meets: all but those of experts it is not sent to."""
    if EXPERT not in spec.axes:
        return spec.size
    return spec.size * config.experts_per_token // config.n_experts


def attention_flops_per_token(config: ModelConfig, keys: dict[str, float]) -> float:
    """Scores and weighted values of one query token; `keys` is how many keys a layer kind sees."""
    per_key = 4 * config.n_heads * config.head_dim
    return sum(per_key * keys[kind] for kind in config.layer_kinds)


def mean_keys(config: ModelConfig, seq_len: int) -> dict[str, float]:
    """Keys that a query sees on average over a causal sequence, by kind of layer."""
    window = min(config.window, seq_len)
    local = window - window * (window - 1) / (2 * seq_len)
    return {"global": (seq_len + 1) / 2, "local": local}


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward pass, averaged over a causal sequence of `seq_len`."""
    attention = attention_flops_per_token(config, mean_keys(config, seq_len))
    return 2 * matmul_parameters(config) + attention


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward and backward, three times the forward; recomputation does not count."""
    return 3 * forward_flops_per_token(config, seq_len)
