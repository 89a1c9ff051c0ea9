"""Hugging Face folders written as GGUF, as llama.cpp's convert_hf_to_gguf.py does."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tpu_stack.models.hf.safetensors_file import read_header

NAMES = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
}


def write_gguf(folder: Path, out: Path, type: str = "F32", **changed: Any) -> Path:
    """`folder`'s weights in `out`, matrices as `type`; `changed` metadata by their last words, None
    for one that is left out."""
    config = json.loads((folder / "config.json").read_text())
    name = NAMES[config["architectures"][0]]
    writer = gguf.GGUFWriter(out, name)
    rope = config.get("rope_parameters") or {}
    numbers: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("rope_theta", config.get("rope_theta")),
        "expert_count": config.get("num_experts", config.get("num_local_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        **changed,
    }
    for key, value in numbers.items():
        if isinstance(value, float):
            writer.add_float32(f"{name}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{name}.{key}", value)
    for theirs, array in _tensors(folder, config, name):
        stored = type if array.ndim > 1 else "F32"
        kind = gguf.GGMLQuantizationType[stored]
        data = array if stored == "F32" else gguf.quantize(array, kind)
        writer.add_tensor(theirs, data, raw_dtype=kind)
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_tensor("rope_freqs.weight", rope_factors(rope, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _tensors(folder: Path, config: dict[str, Any], name: str):
    stored = {
        tensor: entry
        for file in folder.glob("*.safetensors")
        for tensor, entry in read_header(file).items()
    }
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[name.upper()], int(config["num_hidden_layers"])
    )
    experts: dict[str, dict[int, np.ndarray]] = {}
    for tensor, entry in stored.items():
        array = entry.read().astype(np.float32)
        if name == "llama" and tensor.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in tensor else "num_key_value_heads"]
            array = permute(array, heads)
        before, dot, after = tensor.partition(".experts.")
        if dot:
            number, _, rest = after.partition(".")
            experts.setdefault(f"{before}.experts.{rest}", {})[int(number)] = array
        else:
            yield names[tensor.removesuffix(".weight")] + ".weight", array
    for tensor, each in experts.items():
        merged = np.stack([each[number] for number in range(len(each))])
        yield names[tensor.removesuffix(".weight")] + ".weight", merged


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.permute: RoPE's halves become neighbours."""
    size = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, size, -1).swapaxes(1, 2).reshape(weights.shape)


def rope_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors: what frequencies are divided by."""
    low, high, factor = (rope[f"{name}factor"] for name in ("low_freq_", "high_freq_", ""))
    first = rope["original_max_position_embeddings"]
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (pair / head_dim)
        if wavelength < first / high:
            factors.append(1.0)
        elif wavelength > first / low:
            factors.append(factor)
        else:
            smooth = (first / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
