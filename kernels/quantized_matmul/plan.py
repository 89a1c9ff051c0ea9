"""Everything static about one call, worked out and validated before the kernel is built."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SCALE_MODES = ("after", "input", "before", "after_group")
LANES = 128
ROWS = 16
"""Smallest block of M: one bfloat16 tile on every chip but 8t, half a float32 one there. Fewer rows
than this are one whole block: Mosaic cannot compile a block that is taller than such an array."""
SUBLANES = 8
"""Pallas's rule for the second-minor axis: a block of scales has a multiple of this many groups."""
MXU_WIDTH = 128
"""Groups narrower than this waste the MXU when each has a product of its own."""
DECODE_M = 64


@dataclass(frozen=True)
class Plan:
    """One call of the kernel.

    Attributes:
      m, k, n: rows of x, contraction, output columns.
      transpose: the weight is [n, k] rather than [k, n].
      weight_dtype: "int8" or "int4".
      group: rows of the weight that share a scale (all of them when per column); 0 per row.
      scale_mode: one of SCALE_MODES.
      bm, bk, bn: block sizes. Multiples of the hardware tile; may exceed the array.
      out_dtype: dtype name of the result.
    """

    m: int
    k: int
    n: int
    transpose: bool
    weight_dtype: str
    group: int
    scale_mode: str
    bm: int
    bk: int
    bn: int
    out_dtype: str

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.m // self.bm), -(-self.n // self.bn), -(-self.k // self.bk))

    @property
    def k_edge(self) -> bool:
        """Whether the last block of the contraction reaches past the array."""
        return self.k % self.bk != 0

    @property
    def weight_block(self) -> tuple[int, int]:
        return (self.bn, self.bk) if self.transpose else (self.bk, self.bn)


def make_plan(
    x: Any,
    values: Any,
    scales: Any,
    transpose: bool = False,
    scale_mode: str | None = None,
    out_dtype: Any = None,
    tiles: tuple[int, int, int] | None = None,
) -> Plan:
    """Validates one call and chooses its blocks; arguments as in `quantized_matmul`."""
    if x.ndim != 2 or values.ndim != 2:
        raise ValueError(f"x and values need two axes, got {x.shape} and {values.shape}")
    k, n = values.shape[::-1] if transpose else values.shape
    if x.shape[1] != k or min(x.shape[0], k, n) < 1:
        raise ValueError(f"x {x.shape} does not fit values {values.shape}, transpose={transpose}")
    out = jnp.dtype(out_dtype or x.dtype)
    for what, dtype, allowed in (
        ("x", x.dtype, ("bfloat16", "float32")),
        ("values", values.dtype, ("int8", "int4")),
        ("scales", scales.dtype, ("bfloat16", "float32")),
        ("out_dtype", out, ("bfloat16", "float32")),
    ):
        if jnp.dtype(dtype).name not in allowed:
            raise ValueError(f"{what} is {jnp.dtype(dtype).name}; supported: {', '.join(allowed)}")
    group = _group(values.shape, scales.shape)
    weight = jnp.dtype(values.dtype).name
    tuned = _tuned(weight, x.shape[0])
    mode = _scale_mode(values.shape[0], group, transpose, scale_mode, tuned["narrow_groups"])
    step_k, step_n = _steps(group, mode, transpose)
    bm, bk, bn = tiles or _tiles(tuned, jnp.dtype(x.dtype).itemsize, step_k, step_n)
    m = x.shape[0]
    bm = m if m < ROWS else min(bm, _round_up(m, ROWS))
    bk, bn = min(bk, _round_up(k, step_k)), min(bn, _round_up(n, step_n))
    if (bm % ROWS and bm != m) or bk % step_k or bn % step_n:
        raise ValueError(
            f"tiles ({bm}, {bk}, {bn}) are not multiples of {(ROWS, step_k, step_n)}, which "
            f"groups of {group} need"
        )
    return Plan(m, k, n, transpose, weight, group, mode, bm, bk, bn, out.name)


def _group(values: tuple[int, ...], scales: tuple[int, ...]) -> int:
    rows, columns = values
    if scales == (rows, 1):
        return 0
    if len(scales) == 3 and scales[1:] == (1, columns) and scales[0] and rows % scales[0] == 0:
        return rows // scales[0]
    raise ValueError(
        f"scales {scales} fit values {values} neither as [G, 1, {columns}] with G dividing "
        f"{rows} nor as [{rows}, 1]"
    )


def _scale_mode(rows: int, group: int, transpose: bool, asked: str | None, narrow: str) -> str:
    per_row, per_column = group == 0, group == rows
    if per_row or per_column:
        right = ("after" if per_row == transpose else "input",)
    elif transpose:
        right = ("before",)
    else:
        right = ("before", "after_group")
        if group >= MXU_WIDTH or narrow == "after_group":
            right = right[::-1]
    if asked is not None and asked not in right:
        raise ValueError(
            f"scale_mode {asked!r} is not possible here (transpose={transpose}, "
            f"{'per row' if per_row else f'groups of {group} in {rows} rows'}); "
            f"possible: {', '.join(right)}"
        )
    return asked or right[0]


def _steps(group: int, mode: str, transpose: bool) -> tuple[int, int]:
    """What bk and bn must be multiples of: whole lanes, and whole tiles of scales."""
    if mode not in ("before", "after_group"):
        return LANES, LANES
    rows = math.lcm(LANES, SUBLANES * group)
    return (LANES, rows) if transpose else (rows, LANES)


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version they were found with, and `tiles` by device kind."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def _tuned(weight: str, m: int) -> dict[str, Any]:
    """This device kind's entry in tiles.json, or that of "default" when it has none of its own."""
    table = read_tiles()["tiles"]
    entry = table.get(device_kind(), table["default"])
    return entry[weight]["decode" if m <= DECODE_M else "prefill"]


def _tiles(tuned: dict[str, Any], x_bytes: int, step_k: int, step_n: int) -> tuple[int, int, int]:
    bk = tuned["bk"] * 2 // x_bytes  # a float32 block is twice the VMEM
    bk = max(step_k, bk // step_k * step_k)
    return tuned["bm"], bk, max(step_n, tuned["bn"] // step_n * step_n)


def device_kind() -> str:
    """The device kind that is traced for: the abstract mesh's, else the default device's."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind
