"""The static plan of one call: validated shapes and dtypes, chosen dtypes, scale mode and blocks.

>>> x, w = jnp.zeros((16, 4096), jnp.bfloat16), jnp.zeros((4096, 512), jnp.int4)
>>> plan = make_plan(x, w, jnp.ones((128, 1, 512), jnp.bfloat16), kind="TPU v6 lite")
>>> plan.scale_mode, plan.operands, plan.grid
('before', ('bfloat16', 'bfloat16'), (1, 1, 1))
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul import e5m2_planes
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
from tpu_stack.kernels.quantized_matmul.strategy import (
    SCALE_MODES,
    WeightSpec,
    choose_strategy,
    masked_copy_rows,
)
from tpu_stack.kernels.quantized_matmul.tiles import read_tiles, tuned
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage, storage_of

__all__ = ["LANES", "ROWS", "SCALE_MODES", "SUBLANES", "Plan", "make_plan", "read_tiles"]

MAX_INT8_K = 2**31 // 2**14 - 1
"""A longer sum of int8 products may overflow int32."""


@dataclass(frozen=True)
class Plan:
    """One call of the kernel.

    Attributes:
      m, k, n: rows of x, contracted dimension, output columns.
      transpose: the weight is [n, k] rather than [k, n].
      storage: how the weight lies in memory.
      operands: dtype names of x and of the weight in the MXU.
      support: "native" or "emulated", and why.
      group: rows of the weight that share a scale; K for one scale per column, 0 for one per row.
      scale_mode: one of SCALE_MODES.
      scales_dtype: dtype name of the scales.
      row_scaled: a float32 factor multiplies each row of the result (x_scales, tensor_scale).
      bm, bk, bn: block sizes. Multiples of the hardware tile; may exceed the array.
      out_dtype: dtype name of the result.
      depth: rows of weight in one tile when the block is multiplied tile by tile: the MXU's depth.
      tile_schedule: the steps that multiply the tiles in turn (interleaved_tiles.py); empty: one
        product for the whole block.
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
    tile_schedule: tuple[str, ...] = ()

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of M, N and K."""
        return (-(-self.m // self.bm), -(-self.n // self.bn), -(-self.k // self.bk))

    @property
    def ragged_k(self) -> bool:
        """Whether the last block of K reaches past the array."""
        return self.k % self.bk != 0

    @property
    def weight_block(self) -> tuple[int, int]:
        """Shape of the block as stored; rows of int32 words for 1-bit weights."""
        rows, columns = (self.bn, self.bk) if self.transpose else (self.bk, self.bn)
        return rows // self.storage.rows, columns

    @property
    def multiplier(self) -> float:
        """The factor from the product with the decoded weight to the product with the weight."""
        if self.uses_planes:
            return e5m2_planes.plane_multiplier(self.storage)
        return self.storage.multiplier(self.operands[1])

    @property
    def accumulator(self) -> str:
        """Dtype name of the running sum."""
        return "int32" if self.integer and self.scale_mode == "after" else "float32"

    @property
    def integer(self) -> bool:
        """Whether the MXU multiplies integers, into int32."""
        return self.operands[1] == "int8"

    @property
    def packed_scale_rows(self) -> int:
        """Rows of the scratch for packed scales (scaling.py); 0 where the plan needs none."""
        if self.uses_planes:
            return self.bk // self.group
        if self.scale_mode != "before" or self.operands[1] == "float32":
            return 0
        rows = self.bn if self.transpose else self.bk
        if not self.interleaves_halves:
            return rows // self.group if self.group % 16 == 0 else 0
        return rows // self.group if self.group >= WORD_ROWS else rows // self.group // 2

    @property
    def uses_planes(self) -> bool:
        """Whether the kernel decodes the weight to e5m2 bit planes (e5m2_planes.py)."""
        narrow = self.storage.bits < 8 and self.scale_mode == "after_group"
        return narrow and self.operands[1] == "float8_e5m2"

    @property
    def has_plane_offset(self) -> bool:
        """Whether the planes hold the weight plus a constant, which x's group sums subtract."""
        return self.uses_planes and e5m2_planes.plane_offset(self.storage) != 0

    @property
    def plane_rows(self) -> int:
        """Rows of x, with its copies, in one product of planes; tiles.json bounds them."""
        return masked_copy_rows(self.bm, self.depth, self.codes_per_byte, self.group)

    @property
    def stripe(self) -> int:
        """Columns of a block that are multiplied at once when it is multiplied tile by tile."""
        return math.gcd(self.bn, 512)

    @property
    def codes_per_byte(self) -> int:
        """Weights in a stored byte."""
        return 8 // self.storage.bits

    @property
    def scales_in_e5m2(self) -> bool:
        """Whether power-of-two scales multiply an e5m2 weight (`scaling.relative_scales`)."""
        return self.scale_mode == "before" and self.operands[1] == "float8_e5m2"

    @property
    def group_sums(self) -> bool:
        """Whether the 1/2 of q + 1/2 needs x's sum over each group."""
        return self.scale_mode == "after_group" and self.storage.adds_ones(self.operands[1])

    @property
    def casts_x(self) -> bool:
        """Whether the kernel casts x to the MXU's dtype. Outside the kernel XLA would write the
        cast x to HBM, at 22 cycles per 1024 elements on v6e."""
        return self.scale_mode != "input" and not (self.uses_planes or self.interleaves_halves)

    @property
    def interleaves_halves(self) -> bool:
        """Whether 1-bit rows are multiplied in the order of `columns.interleave_halves`."""
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
    overrides: dict[str, Any] | None = None,
) -> Plan:
    """Validates one call and chooses its dtypes, scale mode and blocks.

    Arguments as in `quantized_matmul`, of which only shape and dtype are read, and:
      kind: device kind to plan for; None for the one that is traced for.
      overrides: as in `tiles.tuned`.

    Raises: ValueError as `quantized_matmul` does.
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
    entry = tuned(kind, _format(values.dtype, scales.dtype, offset), x.shape[0], overrides)
    weight = WeightSpec(storage, shape, group, jnp.dtype(scales.dtype).name, transpose)
    mode, operands, schedule = choose_strategy(x, weight, kind, entry, scale_mode)
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
        *(out.name, mxu_depth(kind), schedule),
    )


def _format(dtype: Any, scales_dtype: Any, offset: float) -> str:
    """The format's name in tiles.json: its dtype, or the format where several share a dtype."""
    name = jnp.dtype(dtype).name
    if name == "float4_e2m1fn" and jnp.dtype(scales_dtype).name == "float8_e4m3fn":
        return "nvfp4"
    return {"int2": "int2" if offset else "ternary", "int32": "int1"}.get(name, name)
