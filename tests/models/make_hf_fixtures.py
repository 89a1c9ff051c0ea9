"""Writes tests/models/data/hf: tiny models of five families and what `transformers` makes of them.

Needs torch and transformers (5.23 was used), which this project does not; run it with a Python that
has them. Each folder is a Hugging Face folder (config.json, safetensors, tokenizer.json, ...) with
`expected.npz` beside it: tokens [B, T], float32 logits [B, T, V], greedy continuations [B, T + G].

    python tests/models/make_hf_fixtures.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
import torch  # pyright: ignore
from transformers import (  # pyright: ignore
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

OUT = Path(__file__).parent / "data" / "hf"
ROWS, LENGTH, NEW = 2, 10, 8
MARGIN = 1e-3
"""Least distance, relative to the largest logit, between the best two tokens of a continuation."""

SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "qwen3": (
        Qwen3Config,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        MixtralConfig,
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}
SPECIALS = {
    "llama": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "qwen3": (None, "<|endoftext|>", "<|im_end|>"),
    "gemma3": ("<bos>", "<eos>", "<end_of_turn>"),
    "qwen3_moe": (None, "<|endoftext|>", "<|im_end|>"),
    "mixtral": ("<s>", "</s>", None),
}
"""Begin of a sequence, end of a document, end of a turn."""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def randomize(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights that make every part matter: unit-variance products, norms away from identity."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            drawn = torch.rand(weight.shape, generator=generator) + 0.5
            drawn = drawn - 1.0 if "Gemma" in type(model).__name__ else drawn
        else:
            fan_in = weight.shape[-1] if "embed" not in name else 1
            drawn = torch.randn(weight.shape, generator=generator) * fan_in**-0.5
        weight.data.copy_(drawn.to(dtype))


def older_spelling(config: dict) -> dict:
    """The same config as transformers 4 wrote it: rope_theta and rope_scaling."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        config["sliding_window_pattern"] = len(config.pop("layer_types"))
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype", None)
    return config


def check_older_spelling(folder: Path, config: dict) -> None:
    """Fails unless transformers reads the older spelling as the same model."""
    (folder / "config.json").write_text(json.dumps(config))
    old, new = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(folder.parent)
    assert old.rope_parameters == new.rope_parameters, (old, new)
    assert getattr(old, "layer_types", 0) == getattr(new, "layer_types", 0), (old, new)


def write_tokenizer(folder: Path, name: str) -> list[int]:
    """A tokenizer of printable characters with the family's special tokens; their stop ids."""
    bos, eod, turn = SPECIALS[name]
    vocabulary = {chr(code): code - 31 for code in range(32, 127)} | {"\ufffd": 0, "\n": 96}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="\ufffd", fuse_unk=False)
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([token for token in (bos, eod, turn) if token])
    if name == "llama":  # its tokenizer.json adds the first token itself
        single = f"{bos} $A"
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, pair=single + " $B", special_tokens=special
        )
    backend.save(str(folder / "tokenizer.json"))
    said = {"bos_token": bos, "eos_token": turn or eod}
    if name in ("gemma3", "mixtral"):
        said["add_bos_token"] = True
    if name == "gemma3":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        said["chat_template"] = TEMPLATE
    if name == "mixtral":  # as older tokenizers wrote them
        said["eos_token"] = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said, indent=1))
    return [backend.token_to_id(token) for token in (turn, eod) if token]  # pyright: ignore


def expected_of(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, logits and greedy continuations; tokens whose continuation is no close call."""
    for seed in range(100):
        tokens = np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (ROWS, LENGTH))
        with torch.no_grad():
            row, gap = torch.tensor(tokens), np.inf
            logits = model(row).logits.float().numpy()
            for _ in range(NEW):
                last = model(row).logits[:, -1].float()
                best = last.topk(2).values
                gap = min(gap, float((best[:, 0] - best[:, 1]).min()))
                row = torch.cat([row, last.argmax(-1, keepdim=True)], 1)
        if gap > MARGIN * np.abs(logits).max():
            return tokens, logits, row.numpy()
    raise SystemExit("every continuation was a close call")


def write_model(name: str) -> None:
    """One folder: model, tokenizer, older config, expected logits and continuations."""
    folder = OUT / name
    folder.mkdir(parents=True)
    kind, changes = MODELS[name]
    stop = write_tokenizer(folder, name)
    config = kind(**{**SIZES, **changes}, eos_token_id=stop, bos_token_id=97)
    dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    randomize(model, dtype)
    shard = "30KB" if name in ("llama", "mixtral") else "1GB"
    model.generation_config.eos_token_id = stop
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "older").mkdir()
    older = older_spelling(json.loads((folder / "config.json").read_text()))
    check_older_spelling(folder / "older", older)

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens, logits, greedy = expected_of(model)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.astype(np.int32),
        logits=logits,
        greedy=greedy.astype(np.int32),
    )
    print(name, np.abs(logits).max(), sorted(file.name for file in folder.iterdir()))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    for family in MODELS:
        write_model(family)
    print("bytes", sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file()))
