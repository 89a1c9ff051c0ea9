"""The oracle: the same product with numpy in float64 (or float32), from the operands as stored."""

from typing import Any

import numpy as np


def dequantize(values: Any, scales: Any, dtype: Any = np.float64) -> np.ndarray:
    """`values * scales` [rows, columns]; scales [G, 1, columns] or [rows, 1]."""
    wide = np.asarray(values).astype(np.int8).astype(dtype)
    factor = np.asarray(scales).astype(dtype)
    if factor.ndim == 3:
        factor = np.repeat(factor[:, 0], wide.shape[0] // factor.shape[0], axis=0)
    return wide * factor


def reference_quantized_matmul(
    x: Any, values: Any, scales: Any, *, transpose: bool = False, dtype: Any = np.float64
) -> np.ndarray:
    """`x @ (values * scales)` (`.T` when `transpose`) in `dtype`, float64 or float32.

    No rounding but `dtype`'s: what every implementation is compared with.
    """
    weight = dequantize(values, scales, dtype)
    return np.asarray(x).astype(dtype) @ (weight.T if transpose else weight)
