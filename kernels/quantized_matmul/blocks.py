"""The blocks of a call's grid: the tuned or given ones, cut to the arrays and to whole tiles.

>>> x, storage = jnp.ones((16, 4096), jnp.bfloat16), Storage("integer", "int4")
>>> entry = {"bm": 64, "bk": 4096, "bn": 1024}
>>> choose_blocks(x, 4096, 14336, 32, "before", False, storage, None, entry)
(16, 4096, 1024)
"""

import math
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul.widen import Storage

LANES = 128
ROWS = 16
"""Smallest block of M: one bfloat16 tile on every chip but 8t, half a float32 one there. Fewer rows
than this are one whole block: Mosaic cannot compile a block that is taller than such an array."""
EVEN = 64
"""Rows that several blocks of M are multiples of, two tiles of 8 bits: M is cut into equal blocks,
since a last one that is nearly empty takes as long as the others."""
SHARED = 256
"""Columns that blocks of N for several cores are multiples of."""
SUBLANES = 8
"""Pallas's rule for the second-minor axis: a block of scales has a multiple of this many groups."""


def choose_blocks(
    x: Any,
    k: int,
    n: int,
    group: int,
    mode: str,
    transpose: bool,
    storage: Storage,
    tiles: tuple[int, int, int] | None,
    entry: dict[str, Any],
    cores: int = 1,
) -> tuple[int, int, int]:
    """(bm, bk, bn): the tuned or given ones, cut to the arrays, in whole tiles of every operand.

    cores: of the device. Where there is one block of M, they share those of N, so that these are
    as many for each core.
    """
    step_k, step_n = _steps(group, mode, transpose, storage)
    wanted = tiles or _tuned_blocks(entry, jnp.dtype(x.dtype).itemsize, k, step_k, step_n)
    m = x.shape[0]
    bm = m if m < ROWS else min(wanted[0], round_up(m, ROWS))
    if m > bm and tiles is None:
        bm = min(bm, round_up(math.ceil(m / math.ceil(m / bm)), EVEN))
    bk, bn = min(wanted[1], round_up(k, step_k)), min(wanted[2], round_up(n, step_n))
    if tiles is None and m <= bm:
        bn = columns_per_core(n, bn, cores, step_n)
    if (bm % ROWS and bm != m) or bk % step_k or bn % step_n:
        raise ValueError(
            f"tiles ({bm}, {bk}, {bn}) are not multiples of {(ROWS, step_k, step_n)}, which "
            f"groups of {group} need"
        )
    return bm, bk, bn


def columns_per_core(n: int, bn: int, cores: int, step: int = 1) -> int:
    """Columns of a block, `bn` or fewer, of which N has as many for each core.

    step: what they are a multiple of.
    """
    if cores == 1:
        return bn
    blocks = round_up(math.ceil(n / bn), cores)
    return min(bn, round_up(math.ceil(n / blocks), math.lcm(step, SHARED)))


def _steps(group: int, mode: str, transpose: bool, storage: Storage) -> tuple[int, int]:
    """What bk and bn must be multiples of: whole lanes, and whole tiles of weights and scales."""
    rows = storage.step
    if mode in ("before", "after_group"):
        rows = math.lcm(rows, SUBLANES * group)
    return (LANES, rows) if transpose else (rows, LANES)


def _tuned_blocks(
    entry: dict[str, Any], x_bytes: int, k: int, step_k: int, step_n: int
) -> tuple[int, int, int]:
    """The tuned blocks; bk is the largest that divides K, if one is at least half the tuned one."""
    bk = entry["bk"] * 2 // max(x_bytes, 2)  # a float32 block is twice the VMEM
    bk = max(step_k, bk // step_k * step_k)
    for divisor in range(bk, max(bk // 2, 1) - 1, -step_k):
        if k % divisor == 0:
            bk = divisor
            break
    return entry["bm"], bk, max(step_n, entry["bn"] // step_n * step_n)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is no less than the value."""
    return math.ceil(value / multiple) * multiple
