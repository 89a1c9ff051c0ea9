"""Block sizes of a call: the tuned or given ones, clipped to the arrays, in whole tiles.

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
"""Smallest block of M: one bfloat16 tile on every chip but 8t. Fewer rows are one whole block,
since Mosaic cannot compile a block that is taller than such an array."""
EVEN = 64
"""M is cut into equal blocks of a multiple of this many rows, two 8-bit tiles, because a nearly
empty last block takes as long as the others."""
SHARED = 256
"""Blocks of N for several cores are a multiple of this many columns."""
SUBLANES = 8
"""A block of scales has a multiple of this many groups: Pallas's rule for the second-minor axis."""


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
    """(bm, bk, bn): the tuned or given blocks, clipped to the arrays, in whole tiles.

    cores: TensorCores of the device. With one block of M they share the blocks of N, whose number
      is then a multiple of `cores`.

    Raises: ValueError for `tiles` that are not whole tiles of every operand.
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
    """At most `bn` columns of a block such that every core gets as many blocks of N.

    step: the columns are a multiple of it.
    """
    if cores == 1:
        return bn
    blocks = round_up(math.ceil(n / bn), cores)
    return min(bn, round_up(math.ceil(n / blocks), math.lcm(step, SHARED)))


def _steps(group: int, mode: str, transpose: bool, storage: Storage) -> tuple[int, int]:
    """bk and bn must be multiples of these: whole lanes, whole tiles of weights and scales."""
    rows = storage.step
    if mode in ("before", "after_group"):
        rows = math.lcm(rows, SUBLANES * group)
    return (LANES, rows) if transpose else (rows, LANES)


def _tuned_blocks(
    entry: dict[str, Any], x_bytes: int, k: int, step_k: int, step_n: int
) -> tuple[int, int, int]:
    """The tuned blocks, bk reduced to a divisor of K if one is at least half of it."""
    bk = entry["bk"] * 2 // max(x_bytes, 2)  # a float32 block is twice the VMEM
    bk = max(step_k, bk // step_k * step_k)
    for divisor in range(bk, max(bk // 2, 1) - 1, -step_k):
        if k % divisor == 0:
            bk = divisor
            break
    return entry["bm"], bk, max(step_n, entry["bn"] // step_n * step_n)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `value`."""
    return math.ceil(value / multiple) * multiple
