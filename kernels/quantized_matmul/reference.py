"""The oracle: the product in numpy float64 or float32, from the operands as stored."""

from typing import Any

import numpy as np

WORD_ROWS = 256


def stored_values(values: Any, offset: float = 0.0, rows: int | None = None) -> np.ndarray:
    """The unscaled values of a stored weight, float64 [rows, columns]; int32 is words of 32 signs.

    rows: of a packed 1-bit weight; None for all rows of its words.
    """
    array = np.asarray(values)
    if array.dtype == np.int32:
        words, columns = array.shape
        bits = array.view(np.uint32).reshape(words // 8, 1, 8, columns)
        bits = (bits >> np.arange(32, dtype=np.uint32).reshape(1, 32, 1, 1)) & 1
        return np.where(bits.reshape(words * 32, columns) > 0, 1.0, -1.0)[:rows]
    if array.dtype.name in ("int4", "int2"):
        array = array.astype(np.int8)
    elif array.dtype.name == "float4_e2m1fn":
        array = array.astype(np.float32)
    return array.astype(np.float64) + offset


def dequantize(
    values: Any,
    scales: Any,
    dtype: Any = np.float64,
    *,
    tensor_scale: Any = None,
    offset: float = 0.0,
    rows: int | None = None,
) -> np.ndarray:
    """`(values + offset) * scales * tensor_scale` [rows, columns] in `dtype`.

    Scales [G, 1, columns] or [rows, 1]; other arguments as in `quantized_matmul`.
    """
    wide = stored_values(values, offset, rows).astype(dtype)
    factor = np.asarray(scales).astype(np.float32).astype(dtype)
    if tensor_scale is not None:
        factor = factor * np.asarray(tensor_scale).astype(dtype).reshape(())
    if factor.ndim == 3:
        factor = np.repeat(factor[:, 0], wide.shape[0] // factor.shape[0], axis=0)
    return wide * factor


def reference_quantized_matmul(
    x: Any,
    values: Any,
    scales: Any,
    *,
    tensor_scale: Any = None,
    x_scales: Any = None,
    offset: float = 0.0,
    transpose: bool = False,
    rows: int | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """`x_scales * (x @ W)` (`W.T` when `transpose`) in `dtype`, float64 or float32.

    Rounds in `dtype` only; every implementation is compared with it.
    """
    if np.asarray(values).dtype == np.int32 and not transpose:
        rows = np.asarray(x).shape[1]
    weight = dequantize(values, scales, dtype, tensor_scale=tensor_scale, offset=offset, rows=rows)
    wide = np.asarray(x)
    if wide.dtype.kind == "V" or wide.dtype.name.startswith("float8"):
        wide = wide.astype(np.float32)
    y = wide.astype(dtype) @ (weight.T if transpose else weight)
    return y if x_scales is None else y * np.asarray(x_scales).astype(dtype)
