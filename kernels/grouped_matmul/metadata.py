"""The grid's schedule: which expert multiplies which block of rows, computed on the device.

Rows are sorted by expert. A *visit* is a pair (block, expert with a row in it); in order they visit
all experts of one block in turn, so the output block stays in VMEM until all its rows are written.
There are fewer than blocks + experts visits. The method is that of MegaBlocks (arXiv:2211.15841) as
in JAX's megablox, but blocks need not divide the rows.

>>> found = visits(jnp.array([100, 0, 60], jnp.int32), rows=200, block=128)
>>> found.count.item(), found.expert[:4].tolist(), found.block[:4].tolist()
(4, [0, 2, 2, 3], [0, 0, 1, 1])
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """The visits, and the rows of each expert.

    Attributes:
      expert: int32 [S], of each visit; E for visits to padding rows.
      block: int32 [S], of each visit; never decreases.
      weight: int32 [S], the expert whose weight is in VMEM: `expert`, but for padding rows the last
        expert with rows, so that nothing is fetched.
      bounds: int32 [E + 2]; rows bounds[e] to bounds[e + 1] belong to expert e, and E is padding.
      count: int32 scalar, the number of visits; the rest of the S is unused.
    """

    expert: Int[Array, " S"]
    block: Int[Array, " S"]
    weight: Int[Array, " S"]
    bounds: Int[Array, " E2"]
    count: Int[Array, ""]


def expert_of_rows(group_sizes: Int[Array, " E"], rows: int) -> Int[Array, " M"]:
    """int32 [rows]: the expert of each row; E for padding, rows past the sum of `group_sizes`."""
    ends = _running_sum(jnp.maximum(group_sizes, 0))
    return jnp.sum(ends[None] <= jnp.arange(rows)[:, None], 1, dtype=jnp.int32)


def visits(group_sizes: Int[Array, " E"], rows: int, block: int, interpret: Any = None) -> Visits:
    """The visits to ceil(rows / block) blocks; S is their number plus E.

    A Pallas kernel of one scalar loop: XLA would split the same arithmetic into a dozen programs,
    each of which costs as much to start as all of it.

    Args:
      group_sizes: int32 [E]; sizes that exceed `rows` in sum are cut.
      rows, block: rows in all, and of a block.
      interpret: as in `grouped_matmul`.
    """
    run = partial(_visits, rows=rows, block=block)
    if interpret is not None:
        return run(group_sizes, interpret=interpret)
    return jax.lax.platform_dependent(
        group_sizes, cpu=partial(run, interpret=True), tpu=partial(run, interpret=False)
    )


def _visits(group_sizes: Array, rows: int, block: int, interpret: Any) -> Visits:
    experts = group_sizes.shape[0]
    steps = -(-rows // block) + experts
    lengths = (steps, steps, steps, experts + 2, 1)
    expert, at, weight, bounds, count = pl.pallas_call(
        partial(_kernel, rows=rows, block=block),
        out_shape=[jax.ShapeDtypeStruct((length,), jnp.int32) for length in lengths],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(lengths),
        interpret=interpret,
        name="visits",
    )(group_sizes)
    return Visits(expert, at, weight, bounds, count.reshape(()))


def _kernel(
    sizes_ref: Any,
    expert_ref: Any,
    block_ref: Any,
    weight_ref: Any,
    bounds_ref: Any,
    count_ref: Any,
    rows: int,
    block: int,
) -> None:
    experts, steps = sizes_ref.shape[0], expert_ref.shape[0]

    def put(step: Any, expert: Any, at: Any, weight: Any) -> None:
        expert_ref[step] = expert
        block_ref[step] = at
        weight_ref[step] = weight

    def visit(expert: Any, so_far: Any) -> Any:
        step, start, last = so_far
        size = sizes_ref[jnp.minimum(expert, experts - 1)]
        size = jnp.where(expert < experts, jnp.maximum(size, 0), rows)  # expert E: padding rows
        end = jnp.minimum(start + jnp.minimum(size, rows), rows)
        last = jnp.where((end > start) & (expert < experts), expert, last)
        bounds_ref[expert] = start
        first, until = start // block, jnp.where(end > start, (end - 1) // block + 1, 0)

        def one(at: Any, step: Any) -> Any:
            put(step, expert, at, jnp.minimum(expert, last))
            return step + 1

        return jax.lax.fori_loop(first, jnp.maximum(first, until), one, step), end, last

    zero = jnp.int32(0)
    count, _, last = jax.lax.fori_loop(0, experts + 1, visit, (zero, zero, zero))
    bounds_ref[experts + 1] = jnp.int32(rows)
    count_ref[0] = count
    # Entries past the last visit are never used, but must be valid indices.
    end = jnp.int32(-(-rows // block) - 1)
    jax.lax.fori_loop(count, steps, lambda step, _: put(step, jnp.int32(experts), end, last), None)


def _running_sum(sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """cumsum by one comparison of all pairs, [E]."""
    index = jnp.arange(sizes.shape[0])
    return jnp.sum(jnp.where(index[None] <= index[:, None], sizes[None], 0), 1)
