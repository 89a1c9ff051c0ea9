"""The Pallas TPU kernel: online softmax over blocks of pages fetched through the page table.

Grid (sequence, block of key heads, block of pages), pages innermost. The pages of a block are
operands of their own, all of them the same array: each has an index map that looks its page up in
a prefetched list, so that the pipeline fetches the next block's pages while this one computes.
Steps past a sequence's end name the page that is already there, so nothing is fetched for them,
and compute nothing; tokens before the window have no steps at all.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.kv_attention.plan import Plan

_MASKED = -1e30
_MIB = 2**20


def pallas_kv_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    lengths: Array,
    *scales: Array,
    plan: Plan,
    interpret: Any,
) -> Float[Array, "B N H"]:
    """Runs the kernel that `plan` describes. Use `kv_attention`, which makes the plan."""
    kv_heads, count, page, head_dim = k_pages.shape
    q_BKGH = q.reshape(plan.batch, kv_heads, plan.group, head_dim)
    whole = pl.BlockSpec(
        (1, plan.heads, plan.group, head_dim), lambda b, h, j, *prefetched: (b, h, 0, 0)
    )

    def page_specs(block: tuple[int, int]) -> list[pl.BlockSpec]:
        shape = (plan.heads, 1, *block)

        def index_map(i: int) -> Any:
            return lambda b, h, j, fetch_ref, _: (h, fetch_ref[b, j * plan.pages + i], 0, 0)

        return [pl.BlockSpec(shape, index_map(i)) for i in range(plan.pages)]

    specs = [whole, *page_specs((page, head_dim)), *page_specs((page, head_dim))]
    for _ in scales:
        specs += page_specs((1, page))
    operands = [a for array in (k_pages, v_pages, *scales) for a in [array] * plan.pages]
    out = pl.pallas_call(
        partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=plan.grid,
            in_specs=specs,
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((plan.heads, plan.group, 1), jnp.float32),
                pltpu.VMEM((plan.heads, plan.group, 1), jnp.float32),
                pltpu.VMEM((plan.heads, plan.group, head_dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(plan, k_pages.dtype.itemsize, q.dtype.itemsize),
        ),
        cost_estimate=_cost(plan, k_pages.dtype.itemsize),
        interpret=interpret,
        name=f"kv_attention_{k_pages.dtype.name}",
    )(_pages_to_fetch(page_table, lengths, count, plan), lengths, q_BKGH, *operands)
    return out.reshape(q.shape)


def _first_block(length: Array, plan: Plan) -> Array | int:
    """The block that holds the first token in sight."""
    if plan.window is None:
        return 0
    return jnp.maximum(length - plan.window, 0) // plan.tokens


def _pages_to_fetch(page_table: Array, lengths: Array, count: int, plan: Plan) -> Array:
    """int32 [B, steps * pages]: the page of each operand at each step. Worked out here, because
    scalar arithmetic in the index maps of all operands would cost as much as the attention.

    No entry of the table past the length is used: there the last page within it stays.
    """
    length = jnp.clip(lengths, 0, plan.table * plan.page)[:, None]
    last = jnp.maximum(pl.cdiv(length, plan.page) - 1, 0)
    entry = _first_block(length, plan) * plan.pages + jnp.arange(plan.grid[2] * plan.pages)
    fetch = jnp.take_along_axis(page_table, jnp.minimum(entry, last), axis=1)
    # A sequence without tokens may have any number in its first entry.
    return jnp.clip(fetch, 0, count - 1)


def _vmem_limit(plan: Plan, page_bytes: int, q_bytes: int) -> int:
    """Two buffers of every page, and keys and values widened."""
    elements = 2 * plan.heads * plan.tokens * max(plan.head_dim, 128)
    return max(16 * _MIB, elements * (2 * page_bytes + 2 * q_bytes) + 8 * _MIB)


def _cost(plan: Plan, page_bytes: int) -> pl.CostEstimate:
    """For full sequences: what the compiler schedules around is known only when it runs."""
    seen = plan.batch * plan.grid[2] * plan.tokens
    return pl.CostEstimate(
        flops=4 * seen * plan.q_heads * plan.head_dim,
        bytes_accessed=2 * seen * plan.kv_heads * plan.head_dim * page_bytes,
        transcendentals=seen * plan.q_heads,
    )


def _kernel(fetch_ref, lengths_ref, q_ref, *refs, plan: Plan):
    """One block of pages for a block of heads: running maximum, sum and weighted values."""
    n = plan.pages
    pages, (o_ref, m_ref, l_ref, acc_ref) = refs[:-4], refs[-4:]
    k_refs, v_refs, k_scales, v_scales = (pages[i * n : (i + 1) * n] for i in range(4))
    j = pl.program_id(2)
    length = jnp.clip(lengths_ref[pl.program_id(0)], 0, plan.table * plan.page)
    first_token = (_first_block(length, plan) + j) * plan.tokens

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, _MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first_token < length)
    def _():
        # All heads at each stage, so that the chain of one hides behind the others'.
        heads, dtype = range(plan.heads), q_ref.dtype
        mixed = _multiplies_float8(k_refs[0].dtype, dtype, plan)
        widened = k_refs[0].dtype if mixed else dtype
        keys = (_joined(k_refs, head, widened) for head in heads)
        s = jnp.stack([_dot(q_ref[0, head], k, ((1,), (1,))) for head, k in enumerate(keys)])
        s = s * plan.scale
        if plan.scaled:
            s = s * _joined_scales(k_scales)
        if plan.softcap is not None:
            s = plan.softcap * jnp.tanh(s / plan.softcap)
        seen = _in_sight(s.shape, 2, first_token, length, plan)
        s = jnp.where(seen, s, _MASKED)
        m_old = m_ref[...]
        m_new = jnp.maximum(m_old, jnp.max(s, axis=2, keepdims=True))
        p = jnp.exp(s - m_new)
        keep = jnp.exp(m_old - m_new)
        m_ref[...] = m_new
        l_ref[...] = l_ref[...] * keep + jnp.sum(p, axis=2, keepdims=True)
        if plan.scaled:
            p = jnp.where(seen, p * _joined_scales(v_scales), 0.0)
        p = p.astype(dtype)
        # Pages are reused: what lies beyond the length may be another's NaN, and 0 * NaN.
        if mixed:
            used = _words_in_sight((plan.tokens // 4, plan.head_dim), first_token, length, plan)
        else:
            used = _in_sight((plan.tokens, plan.head_dim), 0, first_token, length, plan)
        integers = jnp.issubdtype(v_refs[0].dtype, jnp.integer)
        added = []
        for head in heads:
            v = _joined(v_refs, head, widened)
            if mixed:
                v = pltpu.bitcast(pltpu.bitcast(v, jnp.int32) & used, v.dtype)
            elif not integers:
                v = jnp.where(used, v, jnp.zeros_like(v))
            added.append(_dot(p[head], v, ((1,), (0,))))
        acc_ref[...] = acc_ref[...] * keep + jnp.stack(added)

    @pl.when(j == plan.grid[2] - 1)
    def _():
        total = l_ref[...]
        o_ref[0] = (acc_ref[...] / jnp.where(total == 0, 1.0, total)).astype(o_ref.dtype)


def _multiplies_float8(pages: Any, queries: Any, plan: Plan) -> bool:
    """Whether float8 pages go to the product as they are, which where it is not native takes Mosaic
    a fraction of the instructions of a cast. Pages join so in whole tiles only, of 32 tokens.
    """
    return pages == jnp.float8_e4m3fn and queries == jnp.bfloat16 and plan.page % 32 == 0


def _words_in_sight(shape: tuple[int, int], first_token: Array, length: Array, plan: Plan) -> Array:
    """int32 of `shape`: for words of four tokens' bytes, ones in the bytes of `_in_sight`'s."""
    token = first_token + 4 * jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    ones = jnp.zeros(shape, jnp.int32)
    for i in range(4):
        seen = token + i < length
        if plan.window is not None:
            seen &= token + i >= length - plan.window
        byte = 0xFF << 8 * i if i < 3 else -(1 << 24)
        ones |= jnp.where(seen, byte, 0)
    return ones


def _joined(refs: Any, head: int, dtype: Any) -> Array:
    """One head of a block's pages as one array [tokens, H], widened page by page."""
    return jnp.concatenate([ref[head, 0].astype(dtype) for ref in refs])


def _joined_scales(refs: Any) -> Array:
    """The block's scales [heads, 1, tokens]."""
    return jnp.concatenate([ref[:, 0] for ref in refs], axis=2)


def _in_sight(shape: tuple[int, ...], axis: int, first_token: Array, length: Array, plan: Plan):
    """Mask of `shape`: whether the token along `axis` is within the length and the window."""
    token = first_token + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    seen = token < length
    return seen if plan.window is None else seen & (token >= length - plan.window)


def _dot(a: Array, b: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision, preferred_element_type=jnp.float32
    )
