"""Everything static about one call, worked out and validated before the kernel is built."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul import as_bytes
from tpu_stack.kernels.quantized_matmul.blocks import (
    LANES,
    ROWS,
    SUBLANES,
    choose_blocks,
)
from tpu_stack.kernels.quantized_matmul.checks import check_dtypes, group_of, logical_shape
from tpu_stack.kernels.quantized_matmul.operands import (
    casts_float4,
    cores_of,
    device_kind,
    mxu_depth,
    support,
)
from tpu_stack.kernels.quantized_matmul.tiles import read_tiles, tuned
from tpu_stack.kernels.quantized_matmul.ways import SCALE_MODES, Weight, choose_way, copied_rows
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage, storage_of

__all__ = ["LANES", "ROWS", "SCALE_MODES", "SUBLANES", "Plan", "make_plan", "read_tiles"]

MAX_INT8_K = 2**31 // 2**14 - 1
"""A longer sum of products of int8 may leave int32."""


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
        return copied_rows(self.bm, self.depth, self.codes, self.group)

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
    def widens_rows(self) -> bool:
        """Whether the kernel itself widens x to what is multiplied: where x comes as it was given,
        XLA would write it out once more, at 22 cycles for 1024 elements on v6e."""
        return self.scale_mode != "input" and not (self.as_bytes or self.paired)

    @property
    def paired(self) -> bool:
        """Whether 1-bit rows are multiplied in the order of `columns.pair_rows`."""
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
    own: dict[str, Any] | None = None,
) -> Plan:
    """Validates one call and chooses its types and blocks; arguments as in `quantized_matmul`.

    kind: the device kind to plan for; None: the one that is traced for.
    own: as in `tiles.tuned`.
    """
    kind = kind or device_kind()
    if x.ndim != 2 or values.ndim != 2:
        raise ValueError(f"x and values need two axes, got {x.shape} and {values.shape}")
    storage = storage_of(values.dtype, offset, casts_float4(kind))
    out = check_dtypes(x, scales, tensor_scale, x_scales, out_dtype)
    shape = logical_shape(x, values, scales, storage, transpose, rows)
    k, n = shape[::-1] if transpose else shape
    if x.shape[1] != k or min(x.shape[0], k, n) < 1:
        raise ValueError(f"x {x.shape} does not fit values {values.shape}, transpose={transpose}")
    group = group_of(shape, scales.shape)
    entry = tuned(kind, _format(values.dtype, scales.dtype, offset), x.shape[0], own)
    weight = Weight(storage, shape, group, jnp.dtype(scales.dtype).name, transpose)
    mode, operands, ways = choose_way(x, weight, kind, entry, scale_mode)
    if operands[1] == "int8" and k > MAX_INT8_K:
        raise ValueError(f"int8 activations: K = {k} may overflow int32; at most {MAX_INT8_K}")
    cores = cores_of(kind)
    blocks = choose_blocks(x, k, n, group, mode, transpose, storage, tiles, entry, cores)
    return Plan(
        *(x.shape[0], k, n, transpose, storage, operands),
        support(kind, x.dtype, storage, operands),
        *(group, mode, weight.scales_dtype),
        x_scales is not None or tensor_scale is not None,
        *blocks,
        *(out.name, mxu_depth(kind), ways),
    )


def _format(dtype: Any, scales_dtype: Any, offset: float) -> str:
    """The name in tiles.json of values of this dtype; formats of one dtype are told apart."""
    name = jnp.dtype(dtype).name
    if name == "float4_e2m1fn" and jnp.dtype(scales_dtype).name == "float8_e4m3fn":
        return "nvfp4"
    return {"int2": "int2" if offset else "ternary", "int32": "int1"}.get(name, name)
