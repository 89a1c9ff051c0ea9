"""How to compute a product: where scales are applied, which dtypes the MXU multiplies, and whether
the tiles of a block take turns.

    mode, operands, schedule = choose_strategy(x, weight, kind, entry)
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul import e5m2_planes
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
"""A longer sum of products of int8 with 1- to 4-bit weights, of magnitude 14 at most, may leave the
integers and halves that float32 represents."""

MAX_FLOAT_K = 2**24 // (2**7 * 2**3)
"""A longer sum of products of int8 with int4 may leave the integers that float32 represents."""


@dataclass(frozen=True)
class WeightSpec:
    """What `choose_strategy` needs to know of a weight.

    Attributes:
      storage: its encoding in memory.
      shape: rows and columns, as stored.
      group: rows that share a scale; 0 per row.
      scales_dtype: dtype name of the scales.
      transpose: x multiplies its transpose.
    """

    storage: Storage
    shape: tuple[int, int]
    group: int
    scales_dtype: str
    transpose: bool


def choose_strategy(
    x: Any, weight: WeightSpec, kind: str, entry: dict[str, Any], requested: str | None = None
) -> tuple[str, tuple[str, str], tuple[str, ...]]:
    """The scale mode, the dtype names of x and weight in the MXU, and `Plan.tile_schedule`.

    8-bit activations are cast to bfloat16 where a bfloat16 strategy is faster; the cast is exact.

    Args:
      kind: device kind.
      entry: of tiles.json (`tiles.tuned`).
      requested: the caller's scale mode, or None.

    Raises: ValueError for a requested scale mode that these shapes do not allow.
    """
    planes = _planes_pay(x, weight, kind, entry)
    mode = _scale_mode(weight, requested, 0 if planes else entry["after_group_min"])
    if planes and mode == "after_group":
        return mode, ("bfloat16", "float8_e5m2"), ()
    narrow = weight.transpose or weight.group % 16
    power = "bfloat16" if narrow else weight.scales_dtype
    x_dtype = jnp.dtype(x.dtype).name
    if x_dtype in _EXACT_IN_BFLOAT16:
        operands = choose_operands("bfloat16", weight.storage, mode, kind, power)
        schedule = _tile_schedule(x.shape[0], weight, operands, mode, kind, entry)
        if schedule or (x_dtype == "int8" and _exact_as_floats(weight, mode, kind)):
            return mode, operands, schedule
    return mode, choose_operands(x_dtype, weight.storage, mode, kind, power), ()


_EXACT_IN_BFLOAT16 = ("bfloat16", "float8_e4m3fn", "int8")


def _exact_as_floats(weight: WeightSpec, mode: str, kind: str) -> bool:
    """Whether int8 activations may go through a bfloat16 MXU because every sum stays exact."""
    contraction = weight.shape[1 if weight.transpose else 0]
    summed = {"after": contraction, "after_group": weight.group}.get(mode, 0)
    return weight.storage.bits <= 4 and summed <= MAX_FLOAT_K and has_no_int8(kind)


def _planes_pay(x: Any, weight: WeightSpec, kind: str, entry: dict[str, Any]) -> bool:
    """Whether the kernel can decode to e5m2 planes and tiles.json says that this is faster.

    x's group sums must fit the lanes of one register, and N must be whole lanes: with N and K both
    ragged Mosaic aborts ("span_buffer").
    """
    storage, group = weight.storage, weight.group
    x_dtype, after_group_min = jnp.dtype(x.dtype).name, entry["after_group_min"]
    if weight.transpose or x_dtype not in _EXACT_IN_BFLOAT16 or weight.shape[1] % LANES:
        return False
    if group not in (16, 32, 64, 128) and (not group or group % 256):
        return False
    if x_dtype == "int8":
        by_groups = after_group_min is not None and group >= after_group_min
        integers = is_native(kind, x_dtype, x_dtype) and storage.exact_in(x_dtype) and by_groups
        if integers or group > MAX_EXACT_ROWS:
            return False
    if storage.name not in ("codes4", "signs"):
        summed = storage.dtype in ("int2", "int4") and storage.name != "float4"
        if not summed or group < 32 or entry["bk"] > LANES * group:
            return False
    rows = masked_copy_rows(x.shape[0], mxu_depth(kind), 8 // storage.bits, group)
    return rows <= entry["plane_rows_max"]


def _tile_schedule(
    m: int,
    weight: WeightSpec,
    operands: tuple[str, str],
    mode: str,
    kind: str,
    entry: dict[str, Any],
) -> tuple[str, ...]:
    """The schedule of tiles.json for the format, or () where this call cannot use it."""
    schedule = tuple(entry["tile_schedule"])
    if mode != "before" or weight.transpose or weight.group not in (32, 64, 128):
        return ()
    if "before_e5m2" in schedule and operands[1] != "float8_e5m2":
        return ()
    copied = masked_copy_rows(m, mxu_depth(kind), 1, weight.group)
    few = weight.storage.name == "integer" and copied <= entry["schedule_rows_max"]
    return () if "after_group" in schedule and not few else schedule


def masked_copy_rows(m: int, depth: int, codes: int, group: int) -> int:
    """Rows of x with its copies, one per group in a tile of `depth` rows of weight."""
    return round_up(m, ROWS) * len(e5m2_planes.groups_in(slice(0, depth), codes, group))


def _scale_mode(weight: WeightSpec, requested: str | None, after_group_min: int | None) -> str:
    rows, group, transpose = weight.shape[0], weight.group, weight.transpose
    per_row, per_column = group == 0, group == rows
    if per_row or per_column:
        possible = ("after" if per_row == transpose else "input",)
    elif transpose:
        possible = ("before",)
    else:
        possible = ("before", "after_group")
        if after_group_min is not None and group >= after_group_min:
            possible = possible[::-1]
    if requested is not None and requested not in possible:
        raise ValueError(
            f"scale_mode {requested!r} is not possible here (transpose={transpose}, "
            f"{'per row' if per_row else f'groups of {group} in {rows} rows'}); "
            f"possible: {', '.join(possible)}"
        )
    return requested or possible[0]
