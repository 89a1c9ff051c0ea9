"""The Pallas TPU kernel: whole rows in VMEM, so that a row's maximum and its values are one pass.

Where the chip has no fp8 the rounding is done on the float32 bits with integer operations, and the
bytes are reinterpreted as fp8 inside the kernel: the same values as the cast, on every chip.
Outside, XLA takes over twice the kernel's cycles to reinterpret them.
"""

import functools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from tpu_stack.kernels.quantized_matmul.tiles import tiles_kind

TOP = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
MAX_K = 65536
"""A block is at least ROWS whole rows: 8 MiB of float32 at this K, the most that fits buffered."""
ROWS = 32
"""An 8-bit tile has 32 rows on every chip but 8t, which lowers but is not compiled here."""
CHUNK = 8192
"""Columns worked on at once: the float32 copies of longer rows would not fit beside the buffers."""
SMALLEST_NORMAL = 2.0**-126
_MIB = 2**20
_MANTISSA_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2}
_EXPONENT_BIAS = {"float8_e4m3fn": 7, "float8_e5m2": 15}


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version it was found with, the `default` elements of a block, rows
    times K, and under `tuned` what differs from it by device kind and type."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def block_rows(m: int, k: int, dtype: str, kind: str, rows: int | None = None) -> int:
    """Rows per block: all of them when they are few, else a multiple of ROWS, which `rows` too has
    to be."""
    if rows is None:
        table = read_tiles()
        elements = table["tuned"].get(tiles_kind(kind), {}).get(dtype, table["default"])
        rows = max(ROWS, elements // k // ROWS * ROWS)
    elif rows != m and (rows < ROWS or rows % ROWS):
        raise ValueError(f"tiles ({rows},): rows of a block are all {m} or a multiple of {ROWS}")
    return min(m, rows)


def pallas_quantize_rows(
    x: Array, *, dtype: str, native_cast: bool, rows: int, interpret: Any
) -> tuple[Array, Array]:
    """Runs the kernel, `rows` per block. Use `quantize_rows`, which validates."""
    m, k = x.shape
    bits = dtype in _MANTISSA_BITS and not native_cast
    return pl.pallas_call(
        partial(_kernel, dtype=dtype, bits=bits),
        out_shape=(
            jax.ShapeDtypeStruct((m, k), jnp.dtype(dtype)),
            jax.ShapeDtypeStruct((m, 1), jnp.float32),
        ),
        grid=(pl.cdiv(m, rows),),
        in_specs=[pl.BlockSpec((rows, k), lambda i: (i, 0))],
        out_specs=(
            pl.BlockSpec((rows, k), lambda i: (i, 0)),
            pl.BlockSpec((rows, 1), lambda i: (i, 0)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            # Two buffers of input and output, and what is in between for one chunk of columns.
            vmem_limit_bytes=max(16 * _MIB, rows * (10 * k + 24 * min(k, CHUNK)) + 4 * _MIB),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * k, bytes_accessed=m * k * (x.dtype.itemsize + 1), transcendentals=0
        ),
        interpret=interpret,
        name=f"quantize_rows_{dtype}{'_bits' if bits else ''}",
    )(x)


def _kernel(x_ref, values_ref, scales_ref, *, dtype: str, bits: bool):
    """One block of whole rows [rows, K]: their largest magnitude, then their values."""
    whole = x_ref[...].astype(jnp.float32) if x_ref.shape[1] <= CHUNK else None

    def read(columns: Any) -> Array:
        return x_ref[:, columns].astype(jnp.float32) if whole is None else whole

    def largest(columns: Any, so_far: Array) -> Array:
        # Found on the bits, which order as the floats do, with infinity and NaN above all
        # numbers: a float maximum may lose a NaN.
        x = read(columns)
        magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        return jnp.maximum(so_far, jnp.max(magnitude, axis=1, keepdims=True))

    top_bits = _over_columns(x_ref.shape, largest, jnp.zeros(scales_ref.shape, jnp.int32))
    usable = top_bits < 0x7F800000
    regular = usable & (top_bits >= 0x00800000)
    top = jax.lax.bitcast_convert_type(top_bits, jnp.float32)
    scale = jnp.maximum(top * np.float32(1 / TOP[dtype]), SMALLEST_NORMAL)
    inverse = 1.0 / scale
    scales_ref[...] = jnp.where(regular, scale, jnp.where(usable, 1.0, jnp.nan))

    def store(columns: Any, _: Array) -> Array:
        scaled = jnp.where(regular, read(columns) * inverse, 0.0)
        if bits:
            code = _fp8_bits(scaled, dtype).astype(jnp.int8)
            values_ref[:, columns] = pltpu.bitcast(code, jnp.dtype(dtype))
        elif dtype == "int8":
            values_ref[:, columns] = jnp.round(scaled).astype(jnp.int8)
        else:
            values_ref[:, columns] = scaled.astype(dtype)
        return _

    _over_columns(x_ref.shape, store, top_bits)


def _over_columns(shape: tuple[int, int], body: Any, carry: Array) -> Array:
    """`carry = body(columns, carry)` over the columns, at most CHUNK at once."""
    full, rest = divmod(shape[1], CHUNK)
    if full:
        chunk = lambda i, c: body(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK), c)  # noqa: E731
        carry = jax.lax.fori_loop(0, full, chunk, carry)
    return body(slice(full * CHUNK, None), carry) if rest else carry


def _fp8_bits(x: Array, dtype: str) -> Array:
    """The fp8 byte of each float32 of magnitude at most `TOP[dtype]`, as int32 in -128..127.

    A normal result keeps the top bits of the mantissa after adding just under half of what is cut
    (half, and one less, when the last kept bit is even). A subnormal result is a multiple of a
    fixed unit, and adding 2**23 units makes the float adder do the rounding.
    """
    mantissa, bias = _MANTISSA_BITS[dtype], _EXPONENT_BIAS[dtype]
    cut = 23 - mantissa
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    magnitude = word & 0x7FFFFFFF
    odd = (magnitude >> cut) & 1
    normal = ((magnitude + ((1 << (cut - 1)) - 1) + odd) >> cut) - ((127 - bias) << mantissa)
    units = np.float32(2.0 ** (23 + 1 - bias - mantissa))
    subnormal = jax.lax.bitcast_convert_type(jnp.abs(x) + units, jnp.int32) - int(
        units.view(np.int32)
    )
    small = magnitude < ((128 - bias) << 23)
    return jnp.where(small, subnormal, normal) | ((word >> 31) & -128)
