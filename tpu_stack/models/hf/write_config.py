"""A config.json for a model that did not come from one: one of the families, if one fits exactly.

>>> family, body = write_config(get_preset("nano"))
>>> body["architectures"]
['Qwen3ForCausalLM']
"""

import dataclasses
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.families import FAMILIES, Family
from tpu_stack.models.hf.read_config import read_config

_LAYERS = {"global": "full_attention", "local": "sliding_attention"}


def write_config(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family whose config.json, read back, is exactly `config`; and that config.json.

    Raises UserError naming the fields that no family can express.
    """
    nearest: list[str] = []
    for family in FAMILIES:
        if bool(config.n_experts) != ("mlp.router" in family.block):
            continue
        body = _body(family, config)
        try:
            _, back = read_config(body)
        except UserError:
            continue
        differing = [
            field.name
            for field in dataclasses.fields(config)
            if getattr(back, field.name) != getattr(config, field.name)
        ]
        if not differing:
            return family, body
        if not nearest or len(differing) < len(nearest):
            nearest = differing
    raise UserError(
        "no Hugging Face architecture known here expresses this model; the nearest differs in "
        + ", ".join(nearest)
    )


def _body(family: Family, config: ModelConfig) -> dict[str, Any]:
    activation = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[config.activation]
    body: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act": activation,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": _rope(family, config),
        "dtype": "float32",
    }
    if family.rope_theta_local is not None:
        body["layer_types"] = [_LAYERS[kind] for kind in config.layer_kinds]
        body["sliding_window"] = config.window
        body["attn_logit_softcapping"] = config.attention_softcap
        body["final_logit_softcapping"] = config.logit_softcap
        body["query_pre_attn_scalar"] = _scalar(config)
    elif "local" in config.layer_kinds:
        body["sliding_window"] = config.window
    if config.n_experts:
        body["num_experts_per_tok"] = config.experts_per_token
        body["router_aux_loss_coef"] = config.balance_loss
        body["num_local_experts"] = config.n_experts
    if "norm_topk_prob" in family.defaults:
        body["num_experts"] = body.pop("num_local_experts")
        body["moe_intermediate_size"] = config.d_ff
        body["norm_topk_prob"] = config.normalize_experts
    return body


def _scalar(config: ModelConfig) -> float:
    """The number whose power of -1/2 is the query's scale: a whole one where it fits exactly."""
    if config.query_scale is None:
        return config.head_dim
    exact = config.query_scale**-2
    return round(exact) if float(round(exact)) ** -0.5 == config.query_scale else exact


def _rope(family: Family, config: ModelConfig) -> dict[str, Any]:
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    scaling = config.rope_scaling
    if scaling is not None:
        full.update(rope_type=scaling.kind, factor=scaling.factor)
    if scaling is not None and scaling.kind == "llama3":
        full.update(
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max,
        )
    if family.rope_theta_local is None:
        return full
    local = {"rope_type": "default", "rope_theta": config.rope_base_local}
    return {"full_attention": full, "sliding_attention": local}
