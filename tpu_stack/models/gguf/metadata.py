"""From GGUF metadata to the config.json of the same model, which `hf.read_config` understands.

Keys are those of llama.cpp's converter (gguf-py/gguf/constants.py).

    config_of(GgufFile.open(path))["hidden_size"]  # 576
"""

from typing import Any

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.models.config import RopeScaling
from tpu_stack.models.gguf.file import GgufFile
from tpu_stack.models.hf.read_config import as_number
from tpu_stack.models.presets import get_preset
from tpu_stack.models.rope import inverse_frequencies

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""general.architecture -> the class of `transformers`. Mixtral is a llama with experts."""

ROPE_FACTORS = "rope_freqs.weight"
"""What each rotated pair's frequency is divided by: Llama 3.1's scaling, as a tensor."""

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_REQUIRED = ("embedding_length", "block_count", "attention.head_count", "feed_forward_length")
_FRACTIONS = ("epsilon", "freq_base")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_WINDOW = 8192


def config_of(file: GgufFile) -> dict[str, Any]:
    """The settings of a config.json. Raises UserError for a model that this project has not."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{file.path}: architecture {name} is not known here; known: {known}")
    for key in _REQUIRED:
        if f"{name}.{key}" not in file.metadata:
            raise UserError(f"{file.path} lacks {name}.{key}")
    config: dict[str, Any] = {
        key: _one(file, f"{name}.{theirs}")
        for key, theirs in _KEYS.items()
        if f"{name}.{theirs}" in file.metadata
    }
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"{file.path} lacks token_embd.weight")
    config["vocab_size"] = table.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    experts = file.metadata.get(f"{name}.expert_count", 0)
    architecture = ARCHITECTURES[name]
    if experts and name == "llama":
        architecture = "MixtralForCausalLM"
    if experts:
        config["num_local_experts" if name == "llama" else "num_experts"] = experts
    if name == "qwen3moe":
        config["norm_topk_prob"] = True  # llama.cpp's graph of this architecture has no other
    config["architectures"] = [architecture]
    rotated = file.metadata.get(f"{name}.rope.dimension_count")
    width = config.get("head_dim", config["hidden_size"] // max(config["num_attention_heads"], 1))
    if rotated not in (None, width):
        raise UserError(f"{file.path}: RoPE rotates {rotated} of {width} values; all or none here")
    config.setdefault("head_dim", width)
    config.update(_scaling(file, name, config))
    return config


def _one(file: GgufFile, key: str) -> int | float:
    """A number, or the one that a list by layer repeats."""
    value = file.metadata[key]
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{file.path}: {key} differs between layers, which is not supported")
        value = value[0]
    kind = float if key.endswith(_FRACTIONS) else int
    return as_number(value, key, kind, str(file.path))


def _scaling(file: GgufFile, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, where the file has one."""
    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return {"rope_scaling": _llama3(file, config)}
    if kind == "none":
        return {}
    factor = file.metadata.get(f"{name}.rope.scaling.factor")
    return {"rope_scaling": {"rope_type": kind, "factor": factor}}


def _llama3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling whose factors, all of them, are the file's.

    The largest is the factor itself; one in between tells how long the model's first window was.
    """
    factors = file.tensors[ROPE_FACTORS].read().astype(np.float64)
    factor, low, high = float(factors.max()), *_LLAMA3.values()
    base = float(config.get("rope_theta", 10_000.0))
    plain = get_preset("nano").replace(head_dim=config["head_dim"], rope_base=base)
    frequencies = inverse_frequencies(plain, "global").astype(np.float64)
    window = _LLAMA3_WINDOW
    if factors.shape == frequencies.shape and factor > 1:
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (kept > 1e-3) & (kept < 1 - 1e-3)
        turns = low + kept[between] * (high - low)
        if between.any():
            window = round(float(np.median(2 * np.pi * turns / frequencies[between])))
    scaled = plain.replace(rope_scaling=RopeScaling("llama3", factor, low, high, window))
    wanted = frequencies / inverse_frequencies(scaled, "global")
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-4):
        raise UserError(f"{file.path}: {ROPE_FACTORS} is no scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        **_LLAMA3,
        "original_max_position_embeddings": window,
    }
