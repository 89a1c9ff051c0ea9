"""A decoder in NumPy float64, loop by loop, from the papers and Hugging Face's modelling code.

It shares nothing with tpu_stack.models but the names of the configuration's fields and of the
weights, and takes one document at a time: several documents in a row are several calls.
"""

import math
from typing import Any

import numpy as np

from tpu_stack.models.config import ModelConfig


def reference_logits(
    config: ModelConfig, params: dict[str, Any], tokens: list[int], spans: list[int] | None = None
) -> np.ndarray:
    """Logits [T, V] of one document whose first token stands at position 0.

    Tokens with the same number above 0 in `spans` see each other, whatever comes first.
    """
    spans = [0] * len(tokens) if spans is None else spans
    table = np.asarray(params["embed"], np.float64)
    x = np.stack([table[token] for token in tokens])
    if config.scale_embeddings:
        x = x * math.sqrt(config.d_model)
    for layer in range(config.n_layers):
        x = _block(config, _layer(params["blocks"], layer), layer, x, spans)
    x = _rms_norm(config, x, np.asarray(params["final_norm"]["scale"], np.float64))
    head = table.T if config.tie_embeddings else np.asarray(params["unembed"], np.float64)
    logits = x @ head
    if config.logit_softcap is not None:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return logits


def _layer(blocks: dict[str, Any], layer: int) -> dict[str, Any]:
    return {
        name: _layer(value, layer)
        if isinstance(value, dict)
        else np.asarray(value, np.float64)[layer]
        for name, value in blocks.items()
    }


def _rms_norm(config: ModelConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    gain = 1.0 + scale if config.norm_offset else scale
    out = np.empty_like(x)
    for index in np.ndindex(*x.shape[:-1]):
        row = x[index]
        out[index] = row / math.sqrt(sum(v * v for v in row) / len(row) + config.norm_eps) * gain
    return out


def _block(
    config: ModelConfig, weights: dict[str, Any], layer: int, x: np.ndarray, spans: list[int]
) -> np.ndarray:
    kind = config.block_pattern[layer % len(config.block_pattern)]
    normed = _rms_norm(config, x, weights["attention_norm"]["scale"])
    mixed = _attention(config, weights["attention"], kind, normed, spans)
    if config.post_norms:
        mixed = _rms_norm(config, mixed, weights["attention_post_norm"]["scale"])
    x = x + mixed
    hidden = _mlp(config, weights["mlp"], _rms_norm(config, x, weights["mlp_norm"]["scale"]))
    if config.post_norms:
        hidden = _rms_norm(config, hidden, weights["mlp_post_norm"]["scale"])
    return x + hidden


def _frequency(config: ModelConfig, kind: str, pair: int) -> float:
    """Radians per position of one pair (Su et al. 2021; Llama 3.1's rescaling as in HF)."""
    base = config.rope_base if kind == "global" else config.rope_base_local
    frequency = 1.0 / base ** (2 * pair / config.head_dim)
    scaling = config.rope_scaling
    if kind != "global" or scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_max / scaling.low_freq_factor
    shortest = scaling.original_max / scaling.high_freq_factor
    if wavelength > longest:
        return frequency / scaling.factor
    if wavelength < shortest:
        return frequency
    smooth = scaling.original_max / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _rope(config: ModelConfig, kind: str, vector: np.ndarray, position: int) -> np.ndarray:
    half = config.head_dim // 2
    out = np.empty_like(vector)
    for pair in range(half):
        angle = position * _frequency(config, kind, pair)
        first, second = vector[pair], vector[pair + half]
        out[pair] = first * math.cos(angle) - second * math.sin(angle)
        out[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def _attention(
    config: ModelConfig, w: dict[str, Any], kind: str, x: np.ndarray, spans: list[int]
) -> np.ndarray:
    length, size = len(x), config.head_dim
    q = (x @ w["wq"]).reshape(length, config.n_heads, size)
    k = (x @ w["wk"]).reshape(length, config.n_kv_heads, size)
    v = (x @ w["wv"]).reshape(length, config.n_kv_heads, size)
    if config.qk_norm:
        q = _rms_norm(config, q, w["q_norm"]["scale"])
        k = _rms_norm(config, k, w["k_norm"]["scale"])
    q = np.stack([[_rope(config, kind, head, t) for head in q[t]] for t in range(length)])
    k = np.stack([[_rope(config, kind, head, t) for head in k[t]] for t in range(length)])
    scale = 1 / math.sqrt(size) if config.query_scale is None else config.query_scale
    sharing = config.n_heads // config.n_kv_heads
    out = np.zeros((length, config.n_heads, size))
    for head in range(config.n_heads):
        kv = head // sharing
        for t in range(length):
            first = 0 if kind == "global" else max(0, t - config.window + 1)
            seen = [
                s
                for s in range(length)
                if first <= s <= t or (spans[s] == spans[t] and spans[t] > 0)
            ]
            scores = [scale * float(q[t, head] @ k[s, kv]) for s in seen]
            if config.attention_softcap is not None:
                cap = config.attention_softcap
                scores = [cap * math.tanh(score / cap) for score in scores]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            for weight, s in zip(weights, seen, strict=True):
                out[t, head] += weight / sum(weights) * v[s, kv]
    return out.reshape(length, -1) @ w["wo"]


def _mlp(config: ModelConfig, w: dict[str, Any], x: np.ndarray) -> np.ndarray:
    up = x @ w["w_up"]
    if config.gated_mlp:
        return (_activation(config, x @ w["w_gate"]) * up) @ w["w_down"]
    return _activation(config, up) @ w["w_down"]


def _activation(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    if config.activation == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
