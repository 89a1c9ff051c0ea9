"""Attention of one new token per sequence over its keys and values, kept in pages of few bits.

At decode the cache is read once per token and nothing is reused between sequences, so its bytes
are the time: 8-bit pages halve it. Needs only jax.

>>> q, pages = jnp.ones((1, 2, 128)), jnp.ones((1, 4, 16, 128), jnp.bfloat16)  # 4 pages of 16
>>> table, lengths = jnp.array([[2, 0]], jnp.int32), jnp.array([20], jnp.int32)
>>> kv_attention(q, pages, pages, table, lengths).shape
(1, 2, 128)
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tpu_stack.kernels.kv_attention.pallas_tpu import pallas_kv_attention
from tpu_stack.kernels.kv_attention.plan import Plan, make_plan
from tpu_stack.kernels.kv_attention.reference import reference_kv_attention

__all__ = ["Plan", "kv_attention", "make_plan", "reference_kv_attention"]


def kv_attention(
    q: Float[Array, "B N H"],
    k_pages: Array,
    v_pages: Array,
    page_table: Int[Array, "B pages"],
    lengths: Int[Array, " B"],
    k_scales: Float[Array, "K P 1 page"] | None = None,
    v_scales: Float[Array, "K P 1 page"] | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    tiles: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "B N H"]:
    """Softmax attention of each sequence's last token over the tokens in its pages.

    The query is the token at position lengths - 1, whose key and value are in the cache already.
    Query head n reads key head n // (N / K). Scores and softmax are float32; pages are widened to
    q's dtype, in which the two products are taken, accumulated in float32; float8 pages of a
    multiple of 32 tokens meet bfloat16 queries as they are. Online softmax: Milakov
    and Gimelshein 2018 (arXiv:1805.02867); pages: vLLM (arXiv:2309.06180).

    Scales are per token and head. They then multiply the scores and the softmax's weights, [G,
    tokens] each, rather than the pages, [tokens, H], and a token can be written without its
    page's other tokens being quantized again, as a scale per page would ask. The axis of one
    before the tokens is what lets the kernel fetch them page by page; pages of 128 tokens fill a
    tile with it, and shorter ones leave the rest of it empty in device memory.

    Args:
      q: [B, N, H] bfloat16 or float32.
      k_pages, v_pages: [K, P, page, H] bfloat16, float8_e4m3fn or int8, both the same; page is a
        multiple of 16. What lies beyond a sequence's length, NaN included, changes nothing.
      page_table: int32 [B, pages of a sequence]. Entry i of row b is the page of tokens i * page
        on. Entries past the length are not read.
      lengths: int32 [B], 0 to pages * page; beyond that it is cut. A sequence of length 0 gives
        zeros.
      k_scales, v_scales: float32 [K, P, 1, page]; needed for int8, possible for all.
      window: see only this many last tokens, the query's own included. None: all.
      softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.
      scale: of the scores; H ** -0.5 when None.
      tiles: (pages, key heads) per step of the grid; None reads `tiles.json`.
      interpret: as in `quantized_matmul`.

    Returns: [B, N, H] in q's dtype.

    Raises: ValueError for shapes that do not fit, dtypes, pages, windows or tiles unsupported.
    """
    plan = make_plan(
        q,
        k_pages,
        v_pages,
        page_table,
        lengths,
        k_scales,
        v_scales,
        window=window,
        softcap=softcap,
        scale=scale,
        tiles=tiles,
    )
    operands = [q, k_pages, v_pages, page_table, lengths]
    if k_scales is not None and v_scales is not None:
        operands += [k_scales, v_scales]
    call = partial(pallas_kv_attention, plan=plan)
    if interpret is not None:
        return call(*operands, interpret=interpret)
    return jax.lax.platform_dependent(
        *operands, cpu=partial(call, interpret=True), tpu=partial(call, interpret=False)
    )
