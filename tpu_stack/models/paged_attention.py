"""Attention of new tokens over the pages of their sequences.

On TPU one new token per sequence (or a few, when speculating) goes to the kernel; chunks of a
prompt, and everything on CPU, walk the pages in blocks of a fixed size with an online softmax
(Milakov and Gimelshein 2018, arXiv:1805.02867). Blocks lie at fixed positions and one out of
sight adds exactly nothing, so a row's result does not depend on how long its neighbours are.

    pages = (k_pages, v_pages)
    out_BTNH = paged_attend(q, pages, None, tables, positions, None, scale=0.1, softcap=None)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_stack.kernels.kv_attention import kv_attention
from tpu_stack.sharding.axes import HEADS, KV_HEADS
from tpu_stack.sharding.constrain import current_scope

BLOCK = 128
"""Tokens per block, rounded to whole pages."""
KERNEL_TOKENS = 8
"""Up to so many new tokens per row, each is a row of its own to the kernel."""
KERNEL_DTYPES = ("bfloat16", "float8_e4m3fn", "int8")
_LEAST = -1e30

Pages = tuple[Array, Array]


def paged_attend(
    q_BTNH: Float[Array, "B T N H"],
    pages: Pages,
    scales: Pages | None,
    tables_BM: Int[Array, "B M"],
    positions_BT: Int[Array, "B T"],
    window: Int[Array, ""] | int | None,
    *,
    local_window: int | None = None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each token over the tokens of its row at positions up to its own.

    Args:
      q_BTNH: queries; head n reads key head n // (N / K).
      pages: keys and values [K, P, page, H]; `scales` multiply their tokens, [K, P, 1, page].
      tables_BM: pages of each row, in order. positions_BT: where the queries stand; below 0 for
        padding, whose output is zeros.
      window: as in `Mask`. Where it is traced, it is `local_window` or no less than any length.

    Returns: [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    operands = (q_BTNH, pages, scales, tables_BM, positions_BT, window)
    blocks = partial(_attend_blocks, scale=scale, softcap=softcap)
    page = pages[0].shape[2]
    small = q_BTNH.shape[1] <= KERNEL_TOKENS
    if not small or pages[0].dtype.name not in KERNEL_DTYPES or page % 16:
        return blocks(*operands)
    kernel = partial(_attend_kernel, local_window=local_window, scale=scale, softcap=softcap)
    return jax.lax.platform_dependent(*operands, tpu=kernel, default=blocks)


def _attend_blocks(q_BTNH, pages, scales, tables_BM, positions_BT, window, *, scale, softcap):
    B, T, N, H = q_BTNH.shape
    K, _, page, _ = pages[0].shape
    per_block = max(1, BLOCK // page)
    blocks = -(-tables_BM.shape[1] // per_block)
    tables_BM = jnp.pad(tables_BM, ((0, 0), (0, blocks * per_block - tables_BM.shape[1])))
    tokens = per_block * page
    q_KBMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(2, 0, 1, 3, 4).reshape(K, B, -1, H)

    def block(array: Array, ids_BP: Array) -> Array:
        """Tokens of one block, [K, B, tokens, H], in q's dtype."""
        return array[:, ids_BP].astype(q_BTNH.dtype).reshape(K, B, tokens, H)

    def scaled(x: Array, array: Array, ids_BP: Array) -> Array:
        """x [K, B, M, tokens] times its tokens' scales."""
        return x * array[:, ids_BP, 0].reshape(K, B, 1, tokens)

    def step(i, carry):
        m, total, acc = carry
        ids_BP = jax.lax.dynamic_slice_in_dim(tables_BM, i * per_block, per_block, axis=1)
        k = block(pages[0], ids_BP)
        s = jnp.einsum("KBMH,KBSH->KBMS", q_KBMH, k, preferred_element_type=jnp.float32) * scale
        s = s if scales is None else scaled(s, scales[0], ids_BP)
        s = s if softcap is None else softcap * jnp.tanh(s / softcap)
        distance = positions_BT[:, :, None] - (i * tokens + jnp.arange(tokens)[None, None])
        allowed_BTS = distance >= 0
        if window is not None:
            allowed_BTS &= distance < window
        allowed = jnp.repeat(allowed_BTS, N // K, axis=1)[None]
        m_new = jnp.maximum(m, jnp.max(jnp.where(allowed, s, _LEAST), axis=-1))
        p = jnp.where(allowed, jnp.exp(s - m_new[..., None]), 0.0)
        keep = jnp.exp(m - m_new)
        total = total * keep + jnp.sum(p, axis=-1)
        p = (p if scales is None else scaled(p, scales[1], ids_BP)).astype(q_BTNH.dtype)
        v = block(pages[1], ids_BP)
        part = jnp.einsum("KBMS,KBSH->KBMH", p, v, preferred_element_type=jnp.float32)
        return m_new, total, acc * keep[..., None] + part

    m = jnp.full(q_KBMH.shape[:3], _LEAST, jnp.float32)
    carry = (m, jnp.zeros_like(m), jnp.zeros(q_KBMH.shape, jnp.float32))
    first, last = _blocks_in_sight(positions_BT, window, tokens)
    _, total, acc = jax.lax.fori_loop(first, last, step, carry)
    out = (acc / jnp.where(total > 0, total, 1.0)[..., None]).astype(q_BTNH.dtype)
    return out.reshape(K, B, T, N // K, H).transpose(1, 2, 0, 3, 4).reshape(B, T, N, H)


def _blocks_in_sight(positions_BT, window, tokens: int):
    """The first block that any query sees, and one past the last."""
    last = (jnp.max(positions_BT) + tokens) // tokens
    if window is None:
        return jnp.int32(0), last
    nearest = jnp.min(jnp.where(positions_BT >= 0, positions_BT, jnp.max(positions_BT)))
    return jnp.maximum(nearest - window + 1, 0) // tokens, last


def _attend_kernel(
    q_BTNH, pages, scales, tables_BM, positions_BT, window, *, local_window, scale, softcap
):
    """Every new token as a sequence of its own, of the length it sees."""
    B, T, N, H = q_BTNH.shape
    q = q_BTNH.reshape(B * T, N, H)
    operands = (q, *pages, jnp.repeat(tables_BM, T, axis=0), positions_BT.reshape(-1) + 1)
    operands += scales or ()

    heads = (HEADS_AXES, KV_HEADS, KV_HEADS, None, None, KV_HEADS, KV_HEADS)

    def call(window: int | None):
        kernel = partial(kv_attention, window=window, softcap=softcap, scale=scale, interpret=False)
        return on_heads(kernel, heads[: len(operands)], HEADS_AXES)

    if window is None or isinstance(window, int):
        out = call(window)(*operands)
    else:
        out = jax.lax.cond(window == local_window, call(local_window), call(None), *operands)
    return out.reshape(B, T, N, H)


HEADS_AXES = (None, HEADS)
"""Logical axes of the kernel's queries and output, [B, N, H]."""


def on_heads(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function`, run by each device on its own heads where a mesh is in force.

    Args:
      inputs, outputs: the first logical axes of every argument and result: a name, a tuple, or
        None for what every device has whole.
    """
    scope = current_scope()
    if scope is None or scope[0].size == 1:
        return function
    mesh, rules = scope

    def spec(axes: Any) -> PartitionSpec:
        return rules.partition_spec(axes if isinstance(axes, tuple) else (axes,))

    def specs(tree: Any) -> Any:
        return jax.tree.map(spec, tree, is_leaf=lambda x: x is None or not isinstance(x, dict))

    in_specs = tuple(specs(each) for each in inputs)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=specs(outputs), check_vma=False
    )
