"""Hugging Face families: their names, defaults, and names of tensors.

Defaults are those of the family's configuration class in `transformers` 5.23, since published
config.json files leave out what equals them.

>>> family_of({"architectures": ["Qwen3ForCausalLM"]}).name
'qwen3'
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpu_stack.errors import UserError

_ATTENTION = {
    "attention.wq": "self_attn.q_proj.weight",
    "attention.wk": "self_attn.k_proj.weight",
    "attention.wv": "self_attn.v_proj.weight",
    "attention.wo": "self_attn.o_proj.weight",
}
_QK_NORM = {
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
}
_TWO_NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}
_FOUR_NORMS = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention_post_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.scale": "post_feedforward_layernorm.weight",
}
_MLP = {
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_up": "mlp.up_proj.weight",
    "mlp.w_down": "mlp.down_proj.weight",
}
_QWEN_EXPERTS = {
    "mlp.router": "mlp.gate.weight",
    "mlp.w_gate": "mlp.experts.{expert}.gate_proj.weight",
    "mlp.w_up": "mlp.experts.{expert}.up_proj.weight",
    "mlp.w_down": "mlp.experts.{expert}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "mlp.router": "block_sparse_moe.gate.weight",
    "mlp.w_gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "mlp.w_up": "block_sparse_moe.experts.{expert}.w3.weight",
    "mlp.w_down": "block_sparse_moe.experts.{expert}.w2.weight",
}


@dataclass(frozen=True)
class Family:
    """One architecture of `transformers`, as data.

    Attributes:
      architecture, model_type: as config.json spells them.
      block: this project's name of a tensor within a block -> the name within "model.layers.N.";
        `{expert}` where the tensor is one per expert.
      fields: ModelConfig fields that all models of the family share.
      defaults: config.json keys that may be left out, and what they then are; None: optional.
      required: keys whose other values mean a model that this project has no code for.
      rope_theta: RoPE base where config.json has none.
      rope_theta_local: that of windowed layers; None where they share the other's.
    """

    name: str
    architecture: str
    model_type: str
    block: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_theta: float = 10_000.0
    rope_theta_local: float | None = None


_NO_BIAS = {"attention_bias": (False, None)}
_NO_WINDOW = {"use_sliding_window": (False, None)}
_ALL_SPARSE = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        {**_ATTENTION, **_TWO_NORMS, **_MLP},
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        required={**_NO_BIAS, "mlp_bias": (False, None)},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        {**_ATTENTION, **_QK_NORM, **_TWO_NORMS, **_MLP},
        fields={"qk_norm": True},
        defaults={
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        },
        required={**_NO_BIAS, **_NO_WINDOW},
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_ATTENTION, **_QK_NORM, **_FOUR_NORMS, **_MLP},
        fields={
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": True,
            "scale_embeddings": True,
        },
        defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        required={**_NO_BIAS, "use_bidirectional_attention": (False, None)},
        rope_theta=1_000_000.0,
        rope_theta_local=10_000.0,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**_ATTENTION, **_QK_NORM, **_TWO_NORMS, **_QWEN_EXPERTS},
        fields={"qk_norm": True},
        defaults={
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        required={**_NO_BIAS, **_NO_WINDOW, **_ALL_SPARSE},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        "mixtral",
        {**_ATTENTION, **_TWO_NORMS, **_MIXTRAL_EXPERTS},
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        rope_theta=1_000_000.0,
    ),
)

MULTIMODAL = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architectures whose `text_config` is a model of its own, and which."""

OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.")
"""What a multimodal folder's tensors that are no part of its text model begin with."""


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a text model's config.json, by architecture, else by model_type.

    Raises UserError, naming what is known, for any other.
    """
    said = config.get("architectures") or []
    if not isinstance(said, list):
        raise UserError(f"{where}: architectures is {said!r}, not a list of names")
    for family in FAMILIES:
        if family.architecture in said or (
            not said and config.get("model_type") == family.model_type
        ):
            return family
    known = ", ".join([family.architecture for family in FAMILIES] + list(MULTIMODAL))
    name = ", ".join(map(str, said)) or config.get("model_type")
    raise UserError(f"{where}: architecture {name} is not known here; known: {known}")
