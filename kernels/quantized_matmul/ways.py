"""Which way a product is taken: where scales are applied, what the MXU multiplies, tiles in turn.

>>> mode, operands, ways = choose_way(x, weight, kind, entry)
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul import as_bytes
from tpu_stack.kernels.quantized_matmul.blocks import LANES, ROWS, round_up
from tpu_stack.kernels.quantized_matmul.operands import (
    choose_operands,
    has_no_int8,
    is_native,
    mxu_depth,
)
from tpu_stack.kernels.quantized_matmul.widen import Storage

SCALE_MODES = ("after", "input", "before", "after_group")
MAX_EXACT_ROWS = 2048
"""A longer sum of products of int8 with weights of few bits, 14 at most, may leave the integers and
halves that float32 holds."""

MAX_FLOAT_K = 2**24 // (2**7 * 2**3)
"""A longer sum of products of int8 with int4 may leave the integers that float32 holds."""


@dataclass(frozen=True)
class Weight:
    """A weight as `choose_way` sees it.

    Attributes:
      storage: how it lies in memory.
      shape: rows and columns, as stored.
      group: rows that share a scale; 0 per row.
      scales_dtype: dtype name of the scales.
      transpose: it is multiplied by its transpose.
    """

    storage: Storage
    shape: tuple[int, int]
    group: int
    scales_dtype: str
    transpose: bool


def choose_way(
    x: Any, weight: Weight, kind: str, entry: dict[str, Any], asked: str | None = None
) -> tuple[str, tuple[str, str], tuple[str, ...]]:
    """The scale mode, the dtype names of x and of the weight in the product, and `Plan.ways`.

    entry: of tiles.json. asked: the caller's scale mode. Rows of 8 bits are widened where a way
    that takes bfloat16 is the faster one; they are as exact so.
    """
    to_bytes = _to_bytes(x, weight, kind, entry)
    mode = _scale_mode(weight, asked, 0 if to_bytes else entry["after_group_from"])
    if to_bytes and mode == "after_group":
        return mode, ("bfloat16", "float8_e5m2"), ()
    narrow = weight.transpose or weight.group % 16
    power = "bfloat16" if narrow else weight.scales_dtype
    x_dtype = jnp.dtype(x.dtype).name
    if x_dtype in _WIDENED:
        operands = choose_operands("bfloat16", weight.storage, mode, kind, power)
        ways = _ways(x.shape[0], weight, operands, mode, kind, entry)
        if ways or (x_dtype == "int8" and _exact_as_floats(weight, mode, kind)):
            return mode, operands, ways
    return mode, choose_operands(x_dtype, weight.storage, mode, kind, power), ()


_WIDENED = ("bfloat16", "float8_e4m3fn", "int8")
"""Types that bfloat16 holds."""


def _exact_as_floats(weight: Weight, mode: str, kind: str) -> bool:
    """Whether rows of int8 go as bfloat16 where the MXU has no int8: every sum stays exact."""
    contraction = weight.shape[1 if weight.transpose else 0]
    summed = {"after": contraction, "after_group": weight.group}.get(mode, 0)
    return weight.storage.bits <= 4 and summed <= MAX_FLOAT_K and has_no_int8(kind)


def _to_bytes(x: Any, weight: Weight, kind: str, entry: dict[str, Any]) -> bool:
    """Whether `Plan.as_bytes` is possible, and pays by what tiles.json says.

    Groups of x's sums lie in the lanes of one register. Columns are whole lanes: where they and K
    are both ragged Mosaic aborts, "span_buffer".
    """
    storage, group = weight.storage, weight.group
    x_dtype, after_from = jnp.dtype(x.dtype).name, entry["after_group_from"]
    if weight.transpose or x_dtype not in _WIDENED or weight.shape[1] % LANES:
        return False
    if group not in (16, 32, 64, 128) and (not group or group % 256):
        return False
    if x_dtype == "int8":
        by_groups = after_from is not None and group >= after_from
        integers = is_native(kind, x_dtype, x_dtype) and storage.exact_in(x_dtype) and by_groups
        if integers or group > MAX_EXACT_ROWS:
            return False
    if storage.name not in ("codes4", "signs"):
        summed = storage.dtype in ("int2", "int4") and storage.name != "float4"
        if not summed or group < 32 or entry["bk"] > LANES * group:
            return False
    rows = copied_rows(x.shape[0], mxu_depth(kind), 8 // storage.bits, group)
    return rows <= entry["bytes_rows"]


def _ways(
    m: int,
    weight: Weight,
    operands: tuple[str, str],
    mode: str,
    kind: str,
    entry: dict[str, Any],
) -> tuple[str, ...]:
    """`Plan.ways` where tiles.json has some for the format, and they are right for the call."""
    ways = tuple(entry["ways"])
    if mode != "before" or weight.transpose or weight.group not in (32, 64, 128):
        return ()
    if "narrow" in ways and operands[1] != "float8_e5m2":
        return ()
    copied = copied_rows(m, mxu_depth(kind), 1, weight.group)
    if "after" in ways and (weight.storage.name != "integer" or copied > entry["ways_rows"]):
        return ()
    return ways


def copied_rows(m: int, depth: int, codes: int, group: int) -> int:
    """Rows of x in a product of a tile as deep as the MXU: a copy for each group that is in it."""
    return round_up(m, ROWS) * len(as_bytes.groups_of(slice(0, depth), codes, group))


def _scale_mode(weight: Weight, asked: str | None, after_from: int | None) -> str:
    rows, group, transpose = weight.shape[0], weight.group, weight.transpose
    per_row, per_column = group == 0, group == rows
    if per_row or per_column:
        right = ("after" if per_row == transpose else "input",)
    elif transpose:
        right = ("before",)
    else:
        right = ("before", "after_group")
        if after_from is not None and group >= after_from:
            right = right[::-1]
    if asked is not None and asked not in right:
        raise ValueError(
            f"scale_mode {asked!r} is not possible here (transpose={transpose}, "
            f"{'per row' if per_row else f'groups of {group} in {rows} rows'}); "
            f"possible: {', '.join(right)}"
        )
    return asked or right[0]
