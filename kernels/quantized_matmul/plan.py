"""Everything static about one call, worked out and validated before the kernel is built."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul import as_bytes
from tpu_stack.kernels.quantized_matmul.operands import (
    casts_float4,
    choose_operands,
    device_kind,
    mxu_depth,
    support,
)
from tpu_stack.kernels.quantized_matmul.tiles import read_tiles, tuned
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage, storage_of

__all__ = ["SCALE_MODES", "Plan", "make_plan", "read_tiles"]

SCALE_MODES = ("after", "input", "before", "after_group")
LANES = 128
ROWS = 16
"""Smallest block of M: one bfloat16 tile on every chip but 8t, half a float32 one there. Fewer rows
than this are one whole block: Mosaic cannot compile a block that is taller than such an array."""
SUBLANES = 8
"""Pallas's rule for the second-minor axis: a block of scales has a multiple of this many groups."""
MAX_INT8_K = 2**31 // 2**14 - 1
"""A longer sum of products of int8 may leave int32."""
X_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
SCALE_DTYPES = ("bfloat16", "float32", "float8_e8m0fnu", "float8_e4m3fn")


@dataclass(frozen=True)
class Plan:
    """One call of the kernel.

    Attributes:
      m, k, n: rows of x, contraction, output columns.
      transpose: the weight is [n, k] rather than [k, n].
      storage: how the weight lies in memory.
      operands: dtype names of x and of the weight as the MXU multiplies them.
      support: "native" or "emulated", and why.
      group: rows of the weight that share a scale (all of them when per column); 0 per row.
      scale_mode: one of SCALE_MODES.
      scales_dtype: dtype name of the scales.
      row_scaled: the result's rows have a float32 factor each (x_scales, tensor_scale).
      bm, bk, bn: block sizes. Multiples of the hardware tile; may exceed the array.
      out_dtype: dtype name of the result.
      depth: rows of weight in one product where it is taken tile by tile: the depth of the MXU.
      ways: how such tiles are multiplied in turn (by_stripes.py); empty: all in one product.
    """

    m: int
    k: int
    n: int
    transpose: bool
    storage: Storage
    operands: tuple[str, str]
    support: str
    group: int
    scale_mode: str
    scales_dtype: str
    row_scaled: bool
    bm: int
    bk: int
    bn: int
    out_dtype: str
    depth: int
    ways: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.m // self.bm), -(-self.n // self.bn), -(-self.k // self.bk))

    @property
    def k_edge(self) -> bool:
        """Whether the last block of the contraction reaches past the array."""
        return self.k % self.bk != 0

    @property
    def weight_block(self) -> tuple[int, int]:
        """The block as stored: rows of words for 1-bit weights."""
        rows, columns = (self.bn, self.bk) if self.transpose else (self.bk, self.bn)
        return rows // self.storage.rows, columns

    @property
    def unit(self) -> float:
        """What 1 means in the widened weight."""
        if self.as_bytes:
            return as_bytes.unit(self.storage)
        return self.storage.unit(self.operands[1])

    @property
    def accumulator(self) -> str:
        """dtype name of the running sum."""
        return "int32" if self.integer and self.scale_mode == "after" else "float32"

    @property
    def integer(self) -> bool:
        return self.operands[1] == "int8"

    @property
    def words(self) -> int:
        """Rows of the scratch of scales as words, which `as_bytes` and "before" in bfloat16 use."""
        if self.as_bytes:
            return self.bk // self.group
        if self.scale_mode != "before" or self.operands[1] == "float32":
            return 0
        rows = self.bn if self.transpose else self.bk
        if not self.paired:
            return rows // self.group if self.group % 16 == 0 else 0
        return rows // self.group if self.group >= WORD_ROWS else rows // self.group // 2

    @property
    def as_bytes(self) -> bool:
        """Whether weights become float8_e5m2 on whole words; see `as_bytes.py`."""
        narrow = self.storage.bits < 8 and self.scale_mode == "after_group"
        return narrow and self.operands[1] == "float8_e5m2"

    @property
    def centered(self) -> bool:
        """Whether the bytes stand for a weight and a constant, to be taken off by x's sums."""
        return self.as_bytes and as_bytes.center(self.storage) != 0

    @property
    def rows_as_bytes(self) -> int:
        """Rows of x in a product of `as_bytes`, which "bytes_rows" of tiles.json bounds."""
        return _copied_rows(self.m, self.depth, self.group)

    @property
    def stripe(self) -> int:
        """Columns of a block that are taken at once where it is taken tile by tile."""
        return math.gcd(self.bn, 512)

    @property
    def codes(self) -> int:
        """Weights in a byte as stored."""
        return 8 // self.storage.bits

    @property
    def shifted(self) -> bool:
        """Whether power-of-two scales are applied to float8_e5m2; see `scaling.write_shifts`."""
        return self.scale_mode == "before" and self.operands[1] == "float8_e5m2"

    @property
    def group_sums(self) -> bool:
        """Whether the kernel is given x's sum over each group: what the half of q + 1/2 needs."""
        return self.scale_mode == "after_group" and self.storage.adds_ones(self.operands[1])

    @property
    def paired(self) -> bool:
        """Whether 1-bit rows are multiplied in the order of `scaling.pair_rows`."""
        fits = self.group % WORD_ROWS == 0 or (self.group % 8 == 0 and 128 % self.group == 0)
        signs = self.storage.name == "signs" and self.operands[1] == "bfloat16"
        return signs and self.scale_mode == "before" and fits


def make_plan(
    x: Any,
    values: Any,
    scales: Any,
    transpose: bool = False,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
    *,
    tensor_scale: Any = None,
    x_scales: Any = None,
    offset: float = 0.0,
    rows: int | None = None,
    kind: str | None = None,
    alone: bool = True,
) -> Plan:
    """Validates one call and chooses its types and blocks; arguments as in `quantized_matmul`.

    kind: the device kind to plan for; None: the one that is traced for.
    alone: False plans for a kernel without `Plan.as_bytes` and `Plan.ways`, such as
      `grouped_matmul`.
    """
    kind = kind or device_kind()
    if x.ndim != 2 or values.ndim != 2:
        raise ValueError(f"x and values need two axes, got {x.shape} and {values.shape}")
    storage = storage_of(values.dtype, offset, casts_float4(kind))
    out = _check_dtypes(x, scales, tensor_scale, x_scales, out_dtype)
    shape = _logical_shape(x, values, scales, storage, transpose, rows)
    k, n = shape[::-1] if transpose else shape
    if x.shape[1] != k or min(x.shape[0], k, n) < 1:
        raise ValueError(f"x {x.shape} does not fit values {values.shape}, transpose={transpose}")
    group = _group(shape, scales.shape)
    entry = tuned(kind, _format(values.dtype, offset), x.shape[0])
    depth = mxu_depth(kind)
    to_bytes = alone and not transpose and _to_bytes(x, storage, n, group, depth, entry)
    after_from = 0 if to_bytes else entry["after_group_from"]
    mode = _scale_mode(shape[0], group, transpose, scale_mode, after_from)
    power = "bfloat16" if transpose or group % 16 else scales.dtype
    operands = choose_operands(x.dtype, storage, mode, kind, power)
    if to_bytes and mode == "after_group":
        operands = ("bfloat16", "float8_e5m2")
    if operands[1] == "int8" and k > MAX_INT8_K:
        raise ValueError(f"int8 activations: K = {k} may overflow int32; at most {MAX_INT8_K}")
    blocks = _blocks(x, k, n, group, mode, transpose, storage, tiles, entry)
    ways = _ways(x, storage, operands, mode, group, depth, entry) if not transpose else ()
    return Plan(
        *(x.shape[0], k, n, transpose, storage, operands),
        support(kind, x.dtype, storage, operands),
        *(group, mode, jnp.dtype(scales.dtype).name),
        x_scales is not None or tensor_scale is not None,
        *blocks,
        out.name,
        depth,
        ways if alone else (),
    )


def _to_bytes(
    x: Any, storage: Storage, n: int, group: int, depth: int, entry: dict[str, Any]
) -> bool:
    """Whether `Plan.as_bytes` is possible, and pays by what tiles.json says.

    Groups of x's sums lie in the lanes of one register. int8 activations stay exact integers.
    Columns are whole lanes: where they and K are both ragged Mosaic aborts, "span_buffer".
    """
    wide = jnp.dtype(x.dtype).name in ("bfloat16", "float8_e4m3fn")
    if not wide or n % LANES or (group not in (16, 32, 64, 128) and (not group or group % 256)):
        return False
    if storage.name != "codes4":
        summed = storage.dtype in ("int2", "int4") and storage.name != "float4"
        if not summed or group < 32 or entry["bk"] > LANES * group:
            return False
    return _copied_rows(x.shape[0], depth, group) <= entry["bytes_rows"]


def _ways(
    x: Any,
    storage: Storage,
    operands: tuple[str, str],
    mode: str,
    group: int,
    depth: int,
    entry: dict[str, Any],
) -> tuple[str, ...]:
    """`Plan.ways` where tiles.json has some for the format, and they are right for the call."""
    ways = tuple(entry["ways"])
    bfloat16 = jnp.dtype(x.dtype) == jnp.bfloat16 and operands[0] == "bfloat16"
    if mode != "before" or not bfloat16 or group not in (32, 64, 128):
        return ()
    if "narrow" in ways and operands[1] != "float8_e5m2":
        return ()
    if "after" in ways and (
        storage.name != "integer" or _copied_rows(x.shape[0], depth, group) > entry["ways_rows"]
    ):
        return ()
    return ways


def _copied_rows(m: int, depth: int, group: int) -> int:
    """Rows of x in a product of `as_bytes`: a copy for each group in the MXU's depth."""
    return _round_up(m, ROWS) * max(depth // group, 1)


def _format(dtype: Any, offset: float) -> str:
    """The name in tiles.json of values of this dtype."""
    name = jnp.dtype(dtype).name
    return {"int2": "int2" if offset else "ternary", "int32": "int1"}.get(name, name)


def _check_dtypes(x: Any, scales: Any, tensor_scale: Any, x_scales: Any, out_dtype: Any) -> Any:
    narrow = jnp.dtype(x.dtype).name in ("float8_e4m3fn", "int8")
    if x_scales is not None and x_scales.shape != (x.shape[0], 1):
        raise ValueError(f"x_scales is {x_scales.shape}; x {x.shape} needs {(x.shape[0], 1)}")
    if tensor_scale is not None and tensor_scale.size != 1:
        raise ValueError(f"tensor_scale is {tensor_scale.shape}; it must be one number")
    out = jnp.dtype(out_dtype or (jnp.bfloat16 if narrow else x.dtype))
    for what, dtype, allowed in (
        ("x", x.dtype, X_DTYPES),
        ("scales", scales.dtype, SCALE_DTYPES),
        ("out_dtype", out, ("bfloat16", "float32")),
        ("x_scales", getattr(x_scales, "dtype", jnp.float32), ("float32",)),
        ("tensor_scale", getattr(tensor_scale, "dtype", jnp.float32), ("float32",)),
    ):
        if jnp.dtype(dtype).name not in allowed:
            raise ValueError(f"{what} is {jnp.dtype(dtype).name}; supported: {', '.join(allowed)}")
    return out


def _logical_shape(
    x: Any, values: Any, scales: Any, storage: Storage, transpose: bool, rows: int | None
) -> tuple[int, int]:
    """[rows, columns] of the weight, which for 1-bit words is not the array's shape."""
    stored, columns = values.shape
    if storage.name != "signs":
        return stored, columns
    held: int = scales.shape[0] if scales.ndim == 2 else stored * storage.rows
    rows = (rows or int(held)) if transpose else int(x.shape[1])
    if stored != SUBLANES * -(-rows // WORD_ROWS):
        raise ValueError(
            f"{stored} rows of int32 words do not hold {rows} rows of signs, which take "
            f"{SUBLANES * -(-rows // WORD_ROWS)}"
        )
    return rows, columns


def _group(values: tuple[int, int], scales: tuple[int, ...]) -> int:
    rows, columns = values
    if scales == (rows, 1):
        return 0
    if len(scales) == 3 and scales[1:] == (1, columns) and scales[0] and rows % scales[0] == 0:
        return rows // scales[0]
    raise ValueError(
        f"scales {scales} fit values {values} neither as [G, 1, {columns}] with G dividing "
        f"{rows} nor as [{rows}, 1]"
    )


def _scale_mode(
    rows: int, group: int, transpose: bool, asked: str | None, after_from: int | None
) -> str:
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


def _blocks(
    x: Any,
    k: int,
    n: int,
    group: int,
    mode: str,
    transpose: bool,
    storage: Storage,
    tiles: tuple[int, int, int] | None,
    entry: dict[str, Any],
) -> tuple[int, int, int]:
    """(bm, bk, bn): the tuned or given ones, cut to the arrays, in whole tiles of every operand."""
    step_k, step_n = _steps(group, mode, transpose, storage)
    wanted = tiles or _tuned_blocks(entry, jnp.dtype(x.dtype).itemsize, k, step_k, step_n)
    m = x.shape[0]
    bm = m if m < ROWS else min(wanted[0], _round_up(m, ROWS))
    bk, bn = min(wanted[1], _round_up(k, step_k)), min(wanted[2], _round_up(n, step_n))
    if (bm % ROWS and bm != m) or bk % step_k or bn % step_n:
        raise ValueError(
            f"tiles ({bm}, {bk}, {bn}) are not multiples of {(ROWS, step_k, step_n)}, which "
            f"groups of {group} need"
        )
    return bm, bk, bn


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


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
