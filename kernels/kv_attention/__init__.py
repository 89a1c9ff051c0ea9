"""Decode attention: one query token per sequence over a paged, low-bit key/value cache.

At decode the kernel reads the whole cache once per token and reuses none of it between sequences,
so its time is the time to read the cache: 8-bit pages halve it. Needs only jax.

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

    The query is the token at position lengths - 1; its key and value are already in the cache.
    Query head n reads key head n // (N / K). Scores and softmax are float32. The kernel casts pages
    to q's dtype for both products, which accumulate in float32; float8 pages of a multiple of 32
    tokens are multiplied by bfloat16 queries without a cast. Online softmax: Milakov and Gimelshein
    2018 (arXiv:1805.02867); pages: vLLM (arXiv:2309.06180).

    Scales are per token and head. The kernel multiplies the scores and the softmax weights by them,
    [G, tokens] each, rather than the pages, [tokens, H]. Writing a token quantizes that token only,
    which scales per page would not allow. The singleton axis before the tokens lets the kernel copy
    scales page by page: pages of 128 tokens fill a tile, shorter ones leave the rest of it unused.

    Args:
      q: [B, N, H] bfloat16 or float32.
      k_pages, v_pages: [K, P, page, H] bfloat16, float8_e4m3fn or int8, both the same; page is a
        multiple of 16. Tokens beyond a sequence's length are ignored, even NaN.
      page_table: int32 [B, pages of a sequence]. Entry i of row b is the page that holds tokens
        i * page to (i + 1) * page. Entries past the length are not read.
      lengths: int32 [B], clipped to 0 .. pages * page. A sequence of length 0 gives zeros.
      k_scales, v_scales: float32 [K, P, 1, page]; required for int8, optional otherwise.
      window: attend only to this many last tokens, the query's own included; None for all.
      softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.
      scale: multiplies the scores; None for H ** -0.5.
      tiles: (pages, key heads) per step of the grid; None reads `tiles.json`.
      interpret: as in `quantized_matmul`.

    Returns: [B, N, H] in q's dtype.

    Raises: ValueError for shapes that do not fit and unsupported dtypes, pages, windows or tiles.
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
