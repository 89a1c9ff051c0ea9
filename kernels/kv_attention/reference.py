"""The oracle: decode attention in numpy float64, one sequence and head at a time."""

from typing import Any

import numpy as np


def reference_kv_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    lengths: Any,
    k_scales: Any = None,
    v_scales: Any = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """[B, N, H] float64; arguments as in `kv_attention`. Reads visible tokens only."""
    queries = np.asarray(q).astype(np.float64)
    batch, q_heads, head_dim = queries.shape
    group = q_heads // k_pages.shape[0]
    out = np.zeros((batch, q_heads, head_dim))
    for b, length in enumerate(np.asarray(lengths)):
        start = 0 if window is None else max(0, length - window)
        for n in range(q_heads if length > 0 else 0):
            row = np.asarray(page_table)[b]
            k = _tokens(k_pages, k_scales, n // group, row, length)[start:]
            v = _tokens(v_pages, v_scales, n // group, row, length)[start:]
            scores = k @ queries[b, n] * (head_dim**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, n] = weights @ v / weights.sum()
    return out


def _tokens(pages: Any, scales: Any, head: int, row: np.ndarray, length: int) -> np.ndarray:
    """The first `length` tokens of one head, [length, H]."""
    size = pages.shape[2]
    chosen = row[: -(-length // size)]
    tokens = np.asarray(pages)[head, chosen].astype(np.float64)
    if scales is not None:
        tokens = tokens * np.asarray(scales).astype(np.float64)[head, chosen, 0][..., None]
    return tokens.reshape(-1, pages.shape[3])[:length]
