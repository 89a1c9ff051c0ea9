"""Named model configurations, from the models' published config.json files.

>>> get_preset("llama3_8b").n_layers
32
"""

import difflib
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig, RopeScaling

_LLAMA3_ROPE = RopeScaling("llama3", factor=8.0)


def _llama3(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        head_dim=128,
        n_kv_heads=8,
        rope_base=500_000.0,
        rope_scaling=_LLAMA3_ROPE,
        norm_eps=1e-5,
        max_seq_len=131_072,
        **sizes,
    )


def _qwen3(tie_embeddings: bool = False, n_kv_heads: int = 8, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        head_dim=128,
        n_kv_heads=n_kv_heads,
        rope_base=1_000_000.0,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
        max_seq_len=40_960,
        **sizes,
    )


def _gemma3(query_pre_attn_scalar: float, rope_scaling: RopeScaling | None, **sizes: Any):
    return ModelConfig(
        activation="gelu",
        block_pattern=("local",) * 5 + ("global",),
        rope_base=1_000_000.0,
        rope_base_local=10_000.0,
        rope_scaling=rope_scaling,
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        query_scale=query_pre_attn_scalar**-0.5,
        scale_embeddings=True,
        tie_embeddings=True,
        **sizes,
    )


PRESETS: dict[str, ModelConfig] = {
    # For CPU: every size is a multiple of what int4 groups and eight emulated devices need.
    "nano": ModelConfig(
        vocab_size=2048,
        d_model=192,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        d_ff=512,
        tie_embeddings=True,
        qk_norm=True,
        max_seq_len=1024,
    ),
    "smollm2_135m": ModelConfig(
        vocab_size=49_152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        rope_base=100_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_seq_len=8192,
    ),
    "llama3_8b": _llama3(d_model=4096, n_layers=32, n_heads=32, d_ff=14_336),
    "llama3_70b": _llama3(d_model=8192, n_layers=80, n_heads=64, d_ff=28_672),
    "qwen3_0_6b": _qwen3(d_model=1024, n_layers=28, n_heads=16, d_ff=3072, tie_embeddings=True),
    "qwen3_8b": _qwen3(d_model=4096, n_layers=36, n_heads=32, d_ff=12_288),
    "qwen3_32b": _qwen3(d_model=5120, n_layers=64, n_heads=64, d_ff=25_600),
    "qwen3_30b_a3b": _qwen3(
        d_model=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        d_ff=768,
        n_experts=128,
        experts_per_token=8,
        balance_loss=0.001,
    ),
    "mixtral_8x7b": ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        rope_base=1_000_000.0,
        norm_eps=1e-5,
        max_seq_len=32_768,
        n_experts=8,
        experts_per_token=2,
        balance_loss=0.02,
    ),
    "gemma3_1b": _gemma3(
        256.0,
        None,
        vocab_size=262_144,
        d_model=1152,
        n_layers=26,
        n_heads=4,
        n_kv_heads=1,
        head_dim=256,
        d_ff=6912,
        window=512,
        max_seq_len=32_768,
    ),
    "gemma3_27b": _gemma3(
        168.0,
        RopeScaling("linear", factor=8.0),
        vocab_size=262_208,
        d_model=5376,
        n_layers=62,
        n_heads=32,
        n_kv_heads=16,
        head_dim=128,
        d_ff=21_504,
        window=1024,
        max_seq_len=131_072,
    ),
}


def get_preset(name: str) -> ModelConfig:
    """The preset of this name. Raises UserError with the nearest name when there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"perhaps {near[0]!r}" if near else f"one of {', '.join(PRESETS)}"
        raise UserError(f"unknown model {name!r}; {hint}")
    return PRESETS[name]
