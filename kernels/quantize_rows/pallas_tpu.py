"""The Pallas TPU kernel: blocks of whole rows, so that one pass over HBM finds the maximum and
rounds.

Where the chip has no fp8 cast, the kernel rounds the float32 bits with integer operations and
bitcasts the bytes to fp8: the same values as a cast, on every chip. A bitcast outside the kernel
would take XLA twice the kernel's cycles.
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
"""A block has at least ROWS whole rows: 8 MiB of float32 at this K, the most that fits twice."""
ROWS = 32
"""Rows of an 8-bit tile on every chip but 8t, which has no public compiler."""
CHUNK = 8192
"""Columns processed at once: float32 copies of longer rows would not fit beside the buffers."""
SMALLEST_NORMAL = 2.0**-126
_MIB = 2**20
_MANTISSA_BITS = {"float8_e4m3fn": 3, "float8_e5m2": 2}
_EXPONENT_BIAS = {"float8_e4m3fn": 7, "float8_e5m2": 15}


@functools.cache
def read_tiles() -> dict[str, Any]:
    """tiles.json: `libtpu`, the version it was tuned with, the `default` elements of a block (rows
    times K), and under `tuned` its overrides by device kind and dtype."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())


def block_rows(m: int, k: int, dtype: str, kind: str, rows: int | None = None) -> int:
    """Rows of a block: all of them when few, else a multiple of ROWS.

    Raises: ValueError for `rows` that are neither.
    """
    if rows is None:
        table = read_tiles()
        elements = table["tuned"].get(tiles_kind(kind), {}).get(dtype, table["default"])
        rows = max(ROWS, elements // k // ROWS * ROWS)
    elif rows != m and (rows < ROWS or rows % ROWS):
        raise ValueError(f"tiles ({rows},): a block has all {m} rows or a multiple of {ROWS}")
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
            # Two buffers of input and output, and the temporaries of one chunk of columns.
            vmem_limit_bytes=max(16 * _MIB, rows * (10 * k + 24 * min(k, CHUNK)) + 4 * _MIB),
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * k, bytes_accessed=m * k * (x.dtype.itemsize + 1), transcendentals=0
        ),
        interpret=interpret,
        name=f"quantize_rows_{dtype}{'_bits' if bits else ''}",
    )(x)


def _kernel(x_ref, values_ref, scales_ref, *, dtype: str, bits: bool):
    """One block [rows, K] of whole rows: the largest magnitudes, then the values."""
    whole = x_ref[...].astype(jnp.float32) if x_ref.shape[1] <= CHUNK else None

    def read(columns: Any) -> Array:
        return x_ref[:, columns].astype(jnp.float32) if whole is None else whole

    def largest(columns: Any, so_far: Array) -> Array:
        # The maximum of the bits: they order as the floats do, with infinity and NaN above all
        # numbers, while a float maximum may drop a NaN.
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
    """Folds `carry = body(columns, carry)` over chunks of at most CHUNK columns."""
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
