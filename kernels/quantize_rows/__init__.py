"""Dynamic quantization of activations to 8 bits, with one scale per row.

The matmul kernels take the rows and their scales (`x_scales`); chips that multiply fp8 or int8
natively then run at twice their bfloat16 rate. Needs only jax.

>>> values, scales = quantize_rows(jnp.array([[1.0, -2.0, 4.0]]), jnp.int8)
>>> values.tolist(), scales.shape
([[32, -64, 127]], (1, 1))
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.kernels.quantize_rows.pallas_tpu import (
    MAX_K,
    TOP,
    block_rows,
    pallas_quantize_rows,
)
from tpu_stack.kernels.quantize_rows.reference import reference_quantize_rows
from tpu_stack.kernels.quantized_matmul.plan import device_kind

__all__ = ["MAX_K", "NATIVE_FP8", "quantize_rows", "reference_quantize_rows"]

NATIVE_FP8 = ("TPU7x", "TPU8t", "TPU8i")
"""Device kinds with a hardware cast to fp8; the others emulate it."""


def quantize_rows(
    x: Float[Array, "M K"],
    dtype: Any = jnp.float8_e4m3fn,
    *,
    native_cast: bool | None = None,
    tiles: tuple[int] | None = None,
    interpret: Any = None,
) -> tuple[Array, Float[Array, "M 1"]]:
    """Rows of `x` as `values * scales`; a row's largest magnitude becomes that of `dtype`.

    The scale is max|row| * (1/top) in float32, with top 448, 57344 or 127, and at least 2**-126.
    Values are the row times 1/scale in float32, rounded to nearest, ties to even. Subnormal
    elements (below 2**-126) count as zero, as on a TPU. A row of zeros gives zeros and the scale 1.
    A row with a NaN or an infinity gives zeros and the scale NaN, so that every result computed
    from it is NaN, in int8 too.

    Args:
      x: [M, K] bfloat16 or float32; M >= 1, 1 <= K <= `MAX_K`.
      dtype: float8_e4m3fn, float8_e5m2 or int8.
      native_cast: round to fp8 with the chip's cast (True) or with integer operations on the bits
        (False); the values are the same. v5e, v5p and v6e have no fp8, and the compiler's cast
        takes ten times the instructions. None: True where the device kind that is traced for is
        in `NATIVE_FP8`. Ignored for int8.
      tiles: (rows of a block,), all rows or a multiple of 32; None reads `tiles.json`.
      interpret: as in `quantized_matmul`.

    Returns: values [M, K] of `dtype`, scales float32 [M, 1].

    Raises: ValueError for other dtypes, shapes and tiles.
    """
    name = jnp.dtype(dtype).name
    if name not in TOP:
        raise ValueError(f"dtype is {name}; supported: {', '.join(TOP)}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}; supported: bfloat16, float32")
    if x.ndim != 2 or min(x.shape) < 1 or x.shape[1] > MAX_K:
        raise ValueError(f"x is {x.shape}; it needs two axes, [M, K], with 1 <= K <= {MAX_K}")
    kind = device_kind()
    if native_cast is None:
        native_cast = kind in NATIVE_FP8
    m, k = x.shape
    rows = block_rows(m, k, name, kind, tiles[0] if tiles else None)
    call = partial(pallas_quantize_rows, dtype=name, native_cast=native_cast, rows=rows)
    if interpret is not None:
        return call(x, interpret=interpret)
    return jax.lax.platform_dependent(
        x, cpu=partial(call, interpret=True), tpu=partial(call, interpret=False)
    )
