"""Which expert meets which block of rows, worked out on the device before the kernel starts.

Rows are sorted by expert, so the pairs (block, expert that has a row in it), in order, visit each
block's experts one after the other: the output block stays in VMEM until all its rows are there.
At most one pair more per expert than there are blocks. The method is MegaBlocks' as in JAX's
megablox (arXiv:2211.15841), without its requirement that blocks divide the rows.

>>> metadata = visits(group_sizes, rows=1000, block=128)  # metadata.count pairs
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Visits(NamedTuple):
    """The pairs, and where each expert's rows are.

    Attributes:
      expert: int32 [S], of each step; E at the blocks' rows that no expert has.
      block: int32 [S], of each step; never decreasing.
      weight: int32 [S], the expert whose weight is in VMEM then: `expert`, and past the last
        expert with rows that one again, so that nothing is fetched.
      bounds: int32 [E + 2]; rows bounds[e] to bounds[e + 1] are expert e's.
      count: int32 scalar, the steps that there are of the S.
    """

    expert: Int[Array, " S"]
    block: Int[Array, " S"]
    weight: Int[Array, " S"]
    bounds: Int[Array, " E2"]
    count: Int[Array, ""]


def expert_of_rows(group_sizes: Int[Array, " E"], rows: int) -> Int[Array, " M"]:
    """int32 [rows]: each row's expert; E for rows past the sum of `group_sizes`."""
    ends = _running_sum(jnp.maximum(group_sizes, 0))
    return jnp.sum(ends <= jnp.arange(rows)[:, None], 1, dtype=jnp.int32)


def visits(group_sizes: Int[Array, " E"], rows: int, block: int) -> Visits:
    """The visits of ceil(rows / block) blocks. Sizes that add up to more than `rows` are cut.

    All pairs are compared rather than summed, searched and gathered: XLA makes several programs of
    each of those, and to start one costs as much as all the arithmetic here.
    """
    experts = group_sizes.shape[0]
    sizes = jnp.append(jnp.maximum(group_sizes, 0), rows)  # the rows of nobody: one more expert's
    ends = jnp.minimum(_running_sum(sizes), rows)
    starts = jnp.minimum(_running_sum(sizes) - sizes, rows)
    first = starts // block
    blocks = jnp.where(ends > starts, (ends - 1) // block - first + 1, 0)
    until = _running_sum(blocks)
    begin = until - blocks
    count = until[-1]
    step = jnp.minimum(jnp.arange(-(-rows // block) + experts), count - 1)
    here = (begin <= step[:, None]) & (step[:, None] < until)  # one expert at each step
    expert = jnp.sum(jnp.where(here, jnp.arange(experts + 1), 0), 1)
    last = jnp.max(jnp.where(blocks[:-1] > 0, jnp.arange(experts), 0))
    return Visits(
        expert.astype(jnp.int32),
        (step + jnp.sum(jnp.where(here, first - begin, 0), 1)).astype(jnp.int32),
        jnp.minimum(expert, last).astype(jnp.int32),
        jnp.append(starts, rows).astype(jnp.int32),
        count.astype(jnp.int32),
    )


def _running_sum(sizes: Int[Array, " E"]) -> Int[Array, " E"]:
    """cumsum, as one comparison of all pairs."""
    index = jnp.arange(sizes.shape[0])
    return jnp.sum(jnp.where(index <= index[:, None], sizes, 0), 1)
