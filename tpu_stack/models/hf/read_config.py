"""From a Hugging Face config.json to a ModelConfig, in both spellings of RoPE.

`transformers` 4 wrote `rope_theta` and `rope_scaling`; 5 writes `rope_parameters`, which Gemma
3 has per kind of layer. What this project has no code for is refused by the name of its key.

    family, config = read_config(json.loads(Path("config.json").read_text()))
"""

import math
from collections.abc import Mapping
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig, RopeScaling
from tpu_stack.models.hf.families import MULTIMODAL, Family, family_of

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
_LAYERS = {"full_attention": "global", "sliding_attention": "local"}


class _Reader:
    """Typed look-ups in one config.json, with the family's defaults."""

    def __init__(self, config: Mapping[str, Any], family: Family, where: str):
        self.config, self.family, self.where = config, family, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return self.family.defaults.get(key, default) if value is None else value

    def number(self, key: str, kind: type = int, default: Any = None) -> Any:
        """The value of `key` as `kind`. Raises UserError when it is missing or of another type."""
        value = self.get(key, default)
        if value is None:
            raise UserError(f"{self.where} lacks {key}")
        return as_number(value, key, kind, self.where)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} is {value!r}, not true or false")
        return value


def as_number(value: Any, key: str, kind: type, where: str) -> Any:
    """`value` as an int or float; a whole float counts as an int. Raises UserError otherwise."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or (kind is int and value != int(value)):
        raise UserError(
            f"{where}: {key} is {value!r}, not {'a whole' if kind is int else 'a'} number"
        )
    return kind(value)


def text_part(config: Any, where: str = "config.json") -> dict[str, Any]:
    """The text model's settings: the whole config, or `text_config` of a multimodal one.

    Raises UserError when the config is no JSON object, or is quantized.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where} is not a JSON object")
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is set; import the unquantized model")
    for outer, inner in MULTIMODAL.items():
        if outer in (config.get("architectures") or []):
            text = config.get("text_config")
            if not isinstance(text, dict):
                raise UserError(f"{where}: {outer} lacks text_config")
            return dict(text, architectures=[inner])
    return config


def read_config(config: Any, where: str = "config.json") -> tuple[Family, ModelConfig]:
    """The family and the model of a config.json.

    Raises UserError naming the key that is missing, malformed, or asks for what is not built.
    """
    text = text_part(config, where)
    family = family_of(text, where)
    for key, allowed in family.required.items():
        if text.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key} {text[key]!r} is not supported; {allowed[0]!r} is")
    reader = _Reader(text, family, where)
    fields: dict[str, Any] = dict(family.fields)
    fields.update(_sizes(reader))
    fields.update(_layers(reader))
    fields.update(_rope(reader, "local" in fields["block_pattern"]))
    fields.update(_attention(reader))
    if "mlp.router" in family.block:
        fields.update(_experts(reader))
    return family, ModelConfig(**fields)


def _sizes(reader: _Reader) -> dict[str, Any]:
    d_model, n_heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    key = "hidden_activation" if reader.get("hidden_activation") else "hidden_act"
    activation = reader.get(key)
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UserError(
            f"{reader.where}: {key} {activation!r} is not supported; {', '.join(_ACTIVATIONS)} are"
        )
    return {
        "vocab_size": reader.number("vocab_size"),
        "d_model": d_model,
        "n_layers": reader.number("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": reader.number("num_key_value_heads", default=n_heads),
        "head_dim": reader.number("head_dim", default=d_model // max(n_heads, 1)),
        "d_ff": reader.number("intermediate_size"),
        "activation": _ACTIVATIONS[activation],
        "norm_eps": reader.number("rms_norm_eps", float),
        "tie_embeddings": reader.flag("tie_word_embeddings"),
        "max_seq_len": reader.number("max_position_embeddings"),
    }


def _layers(reader: _Reader) -> dict[str, Any]:
    """Which layers see a window: listed by layer, by period, or implied by a window alone."""
    window, layers = reader.get("sliding_window"), reader.number("num_hidden_layers")
    types = reader.get("layer_types")
    if types is not None:
        known = isinstance(types, list) and all(kind in list(_LAYERS) for kind in types)
        if not known or len(types) != layers:
            raise UserError(
                f"{reader.where}: layer_types is {types!r}; {layers} of {', '.join(_LAYERS)}"
            )
        kinds = [_LAYERS[kind] for kind in types]
    elif reader.get("sliding_window_pattern"):
        period = reader.number("sliding_window_pattern")
        kinds = ["global" if layer % period == period - 1 else "local" for layer in range(layers)]
    else:
        # Qwen 3 keeps a window that it does not use.
        windowed = window is not None and "use_sliding_window" not in reader.family.required
        kinds = ["local" if windowed else "global"] * layers
    if "local" not in kinds:
        return {"block_pattern": ("global",)}
    return {"block_pattern": _period(kinds), "window": reader.number("sliding_window")}


def _period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated and cut, is `kinds`."""
    for length in range(1, len(kinds)):
        if all(kind == kinds[layer % length] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:length])
    return tuple(kinds)


def _rope(reader: _Reader, windowed: bool) -> dict[str, Any]:
    """Bases and scaling; local layers have their own base only in families that define one."""
    rope = reader.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{reader.where}: rope_parameters is {rope!r}, not an object")
    per_kind = set(rope) & set(_LAYERS)
    full = dict((rope.get("full_attention") or {}) if per_kind else rope)
    local = dict(rope.get("sliding_attention") or {}) if per_kind else {}
    older = reader.get("rope_scaling") or {}
    if not isinstance(older, dict):
        raise UserError(f"{reader.where}: rope_scaling is {older!r}, not an object")
    full = {**older, **full}
    theta = full.get("rope_theta", reader.get("rope_theta", reader.family.rope_theta))
    base = as_number(theta, "rope_theta", float, reader.where)
    scaling = _scaling(full, reader)
    fields = {"rope_base": base, "rope_scaling": scaling}
    if not windowed:
        return fields
    if reader.family.rope_theta_local is None and scaling is not None:
        raise UserError(f"{reader.where}: a scaled RoPE on sliding_attention is not supported")
    if _scaling(local, reader) is not None:
        raise UserError(f"{reader.where}: rope_parameters of sliding_attention are scaled")
    usual = reader.family.rope_theta_local or base
    own = local.get("rope_theta", reader.get("rope_local_base_freq", usual))
    fields["rope_base_local"] = as_number(own, "rope_local_base_freq", float, reader.where)
    return fields


def _scaling(rope: Mapping[str, Any], reader: _Reader) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{reader.where}: partial_rotary_factor is not supported")

    def number(key: str, type_: type = float, default: Any = None) -> Any:
        value = rope.get(key, default)
        if value is None:
            raise UserError(f"{reader.where}: rope scaling {kind!r} lacks {key}")
        return as_number(value, key, type_, reader.where)

    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            number("factor"),
            number("low_freq_factor"),
            number("high_freq_factor"),
            number("original_max_position_embeddings", int),
        )
    raise UserError(
        f"{reader.where}: rope scaling {kind!r} is not supported; default, linear and llama3 are"
    )


def _attention(reader: _Reader) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, name in (
        ("attn_logit_softcapping", "attention_softcap"),
        ("final_logit_softcapping", "logit_softcap"),
    ):
        if reader.get(key) is not None:
            fields[name] = reader.number(key, float)
    if reader.get("query_pre_attn_scalar") is not None:
        fields["query_scale"] = reader.number("query_pre_attn_scalar", float) ** -0.5
    return fields


def _experts(reader: _Reader) -> dict[str, Any]:
    key = "num_experts" if reader.get("num_experts") is not None else "num_local_experts"
    fields = {
        "n_experts": reader.number(key),
        "experts_per_token": reader.number("num_experts_per_tok"),
        "balance_loss": reader.number("router_aux_loss_coef", float),
    }
    if reader.get("moe_intermediate_size") is not None:
        fields["d_ff"] = reader.number("moe_intermediate_size")
    if "norm_topk_prob" in reader.family.defaults:
        fields["normalize_experts"] = reader.flag("norm_topk_prob")
    return fields
