"""The oracle: the rule of `quantize_rows` in numpy, rounding to float32 exactly where it says."""

from typing import Any

import numpy as np

_TOP = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


def reference_quantize_rows(x: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values [M, K] of `dtype` and scales float32 [M, 1]; the rule is in `quantize_rows`."""
    kind = np.dtype(dtype)
    wide = np.asarray(x).astype(np.float64)
    top = np.abs(wide).max(axis=1, keepdims=True)
    usable = np.isfinite(top)
    regular = usable & (top >= 2.0**-126)
    # Float32 products with reciprocals, as in the kernel: divisions would round elsewhere.
    top = np.where(regular, top, 1.0).astype(np.float32)
    scale = np.maximum(top * np.float32(1 / _TOP[kind.name]), np.float32(2.0**-126))
    inverse = np.float32(1.0) / scale
    wide = np.where(regular & (np.abs(wide) >= 2.0**-126), wide, 0.0)
    scaled = wide.astype(np.float32) * inverse
    scaled = np.rint(scaled) if kind == np.int8 else scaled
    scales = np.where(regular, scale, np.where(usable, 1.0, np.nan)).astype(np.float32)
    return scaled.astype(kind), scales
