"""One online-softmax step: attention over a block of tokens in VMEM.

Example:
    attend(q_ref, buffers, running, first_token, length, plan)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from tpu_stack.kernels.kv_attention.plan import Plan

MASKED = -1e30


def attend(
    q_ref: Any,
    buffers: list[list[Array]],
    running: tuple[Any, Any, Any],
    first_token: Array,
    length: Array,
    plan: Plan,
) -> None:
    """Updates the running maximum, sum and weighted values with one block.

    Args:
      q_ref: [1, heads, G, H].
      buffers: the block's pages of keys and values, [heads, page, H] each, then, when
        `plan.scaled`, of their scales, [heads, 1, page] each.
      running: float32 refs of the maximum and sum, [heads, G, 1], and the values, [heads, G, H].
      first_token: position of the block's first token.
      length: the sequence's length.
    """
    m_ref, l_ref, acc_ref = running
    key_pages, value_pages, *scales = buffers
    # Every stage runs over all heads, so that the latency of one head hides behind the others.
    heads, dtype = range(plan.heads), q_ref.dtype
    stored = key_pages[0].dtype
    mixed = _multiplies_float8(stored, dtype, plan)
    widened = stored if mixed else dtype
    keys = (_joined(key_pages, head, widened) for head in heads)
    s = jnp.stack([_dot(q_ref[0, head], k, ((1,), (1,))) for head, k in enumerate(keys)])
    s = s * plan.scale
    if scales:
        s = s * jnp.concatenate(scales[0], axis=2)
    if plan.softcap is not None:
        s = plan.softcap * jnp.tanh(s / plan.softcap)
    seen = _visible(s.shape, 2, first_token, length, plan)
    s = jnp.where(seen, s, MASKED)
    m_old = m_ref[...]
    m_new = jnp.maximum(m_old, jnp.max(s, axis=2, keepdims=True))
    p = jnp.exp(s - m_new)
    keep = jnp.exp(m_old - m_new)
    m_ref[...] = m_new
    l_ref[...] = l_ref[...] * keep + jnp.sum(p, axis=2, keepdims=True)
    if scales:
        p = jnp.where(seen, p * jnp.concatenate(scales[1], axis=2), 0.0)
    p = p.astype(dtype)
    # Pages are reused: beyond the length may be a NaN of another sequence, and 0 * NaN is NaN.
    if mixed:
        used = _visible_bytes((plan.tokens // 4, plan.head_dim), first_token, length, plan)
    else:
        used = _visible((plan.tokens, plan.head_dim), 0, first_token, length, plan)
    added = []
    for head in heads:
        v = _joined(value_pages, head, widened)
        if mixed:
            v = pltpu.bitcast(pltpu.bitcast(v, jnp.int32) & used, v.dtype)
        elif not jnp.issubdtype(stored, jnp.integer):
            v = jnp.where(used, v, jnp.zeros_like(v))
        added.append(_dot(p[head], v, ((1,), (0,))))
    acc_ref[...] = acc_ref[...] * keep + jnp.stack(added)


def _multiplies_float8(pages: Any, queries: Any, plan: Plan) -> bool:
    """Whether float8 pages are multiplied without a cast.

    Where the product is not native, Mosaic emulates it with a fraction of the instructions of a
    cast. It takes whole tiles of 32 tokens.
    """
    return pages == jnp.float8_e4m3fn and queries == jnp.bfloat16 and plan.page % 32 == 0


def _visible_bytes(shape: tuple[int, int], first_token: Array, length: Array, plan: Plan) -> Array:
    """int32 mask of `shape`: 0xFF in each byte, one of four tokens, whose token is visible."""
    token = first_token + 4 * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    ones = jnp.zeros(shape, jnp.int32)
    for i in range(4):
        seen = token + i < length
        if plan.window is not None:
            seen &= token + i >= length - plan.window
        byte = 0xFF << 8 * i if i < 3 else -(1 << 24)
        ones |= jnp.where(seen, byte, 0)
    return ones


def _joined(pages: list[Array], head: int, dtype: Any) -> Array:
    """One head of a block's pages, cast to `dtype` and concatenated: [tokens, H]."""
    return jnp.concatenate([page[head].astype(dtype) for page in pages])


def _visible(shape: tuple[int, ...], axis: int, first_token: Array, length: Array, plan: Plan):
    """Mask of `shape`: whether the token along `axis` is within the length and the window."""
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    seen = token < length
    return seen if plan.window is None else seen & (token >= length - plan.window)


def _dot(a: Array, b: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision, preferred_element_type=jnp.float32
    )
