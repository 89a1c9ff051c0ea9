"""The Pallas TPU kernel: online softmax over blocks of pages, copied through the page table.

The grid is (core, sequence, block of key heads, block of pages), pages innermost. Each step starts
the copies of the next step's pages and computes on its own. Pallas's pipelined operands would take
twice the scalar instructions, which would then bind. Steps past a sequence's end neither copy nor
compute, and tokens before the window have no steps.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.kv_attention.block import MASKED, attend
from tpu_stack.kernels.kv_attention.pages import Copies, Place, pages_to_fetch
from tpu_stack.kernels.kv_attention.plan import Plan

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
    kv_heads, count, _, head_dim = k_pages.shape
    q_BKGH = q.reshape(plan.batch, kv_heads, plan.group, head_dim)
    sequences = plan.grid[1]
    whole = pl.BlockSpec(
        (1, plan.heads, plan.group, head_dim),
        lambda c, i, h, j, *prefetched: (c * sequences + i, h, 0, 0),
    )
    stored = [k_pages, v_pages, *scales]
    buffers = [
        pltpu.VMEM((2, plan.pages, plan.heads, *array.shape[2:]), array.dtype) for array in stored
    ]
    out = pl.pallas_call(
        partial(_kernel, plan=plan),
        out_shape=jax.ShapeDtypeStruct(q_BKGH.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=plan.grid,
            in_specs=[whole, *[pl.BlockSpec(memory_space=pl.ANY)] * len(stored)],
            out_specs=whole,
            scratch_shapes=[
                *buffers,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((plan.heads, plan.group, 1), jnp.float32),
                pltpu.VMEM((plan.heads, plan.group, 1), jnp.float32),
                pltpu.VMEM((plan.heads, plan.group, head_dim), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_vmem_limit(plan, k_pages.dtype.itemsize, q.dtype.itemsize),
        ),
        cost_estimate=_cost(plan, k_pages.dtype.itemsize),
        interpret=interpret,
        name=f"kv_attention_{k_pages.dtype.name}",
    )(pages_to_fetch(page_table, lengths, count, plan), lengths, q_BKGH, *stored)
    return out.reshape(q.shape)


def _vmem_limit(plan: Plan, page_bytes: int, q_bytes: int) -> int:
    """Bytes of VMEM: two buffers of every page, and the keys and values cast to q's dtype."""
    elements = 2 * plan.heads * plan.tokens * max(plan.head_dim, 128)
    return max(16 * _MIB, elements * (2 * page_bytes + 2 * q_bytes) + 8 * _MIB)


def _cost(plan: Plan, page_bytes: int) -> pl.CostEstimate:
    """The cost of full sequences: actual lengths are known only at run time."""
    seen = plan.batch * plan.steps * plan.tokens
    return pl.CostEstimate(
        flops=4 * seen * plan.q_heads * plan.head_dim,
        bytes_accessed=2 * seen * plan.kv_heads * plan.head_dim * page_bytes,
        transcendentals=seen * plan.q_heads,
    )


def _kernel(fetch_ref, lengths_ref, q_ref, *refs, plan: Plan):
    """One block of pages for a block of heads."""
    stored = 4 if plan.scaled else 2
    hbm, o_ref, buffers = refs[:stored], refs[stored], refs[stored + 1 : 2 * stored + 1]
    semaphores, *running = refs[2 * stored + 1 :]
    copies = Copies(fetch_ref, lengths_ref, hbm, buffers, semaphores, plan)
    core, i, h, j = (pl.program_id(axis) for axis in range(4))
    sequences, blocks, steps = plan.grid[1:]
    here = Place(core * sequences + i, h, j)
    step = (i * blocks + h) * steps + j
    length, first_token = copies.tokens(here)

    @pl.when(step == 0)
    def _():
        copies.start(here, 0, once=True)

    @pl.when(step + 1 < sequences * blocks * steps)
    def _():
        copies.start(_next(here, plan), (step + 1) % 2)

    @pl.when(j == 0)
    def _():
        m_ref, l_ref, acc_ref = running
        m_ref[...] = jnp.full_like(m_ref, MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first_token < length)
    def _():
        slot = step % 2
        copies.wait(here, slot)
        block = [[buffer[slot, page] for page in range(plan.pages)] for buffer in buffers]
        attend(q_ref, block, tuple(running), first_token, length, plan)

    @pl.when(j == steps - 1)
    def _():
        l_ref, acc_ref = running[1:]
        total = l_ref[...]
        o_ref[0] = (acc_ref[...] / jnp.where(total == 0, 1.0, total)).astype(o_ref.dtype)


def _next(place: Place, plan: Plan) -> Place:
    """The next step on the same core."""
    blocks, steps = plan.grid[2:]
    last_block = place.block == steps - 1
    last = last_block & (place.heads == blocks - 1)
    heads = jnp.where(last_block, place.heads + 1, place.heads)
    return Place(
        jnp.where(last, place.sequence + 1, place.sequence),
        jnp.where(last, 0, heads),
        jnp.where(last_block, 0, place.block + 1),
    )
