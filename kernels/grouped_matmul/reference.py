"""The oracle: one expert's product after the other with numpy in float64."""

from typing import Any

import numpy as np

from tpu_stack.kernels.quantized_matmul.reference import reference_quantized_matmul


def reference_grouped_matmul(
    x: Any,
    values: Any,
    scales: Any,
    group_sizes: Any,
    *,
    tensor_scale: Any = None,
    x_scales: Any = None,
    offset: float = 0.0,
    transpose: bool = False,
    rows: int | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """[M, N] in `dtype`; arguments as in `grouped_matmul`, scales None for bfloat16 values."""
    rest = (offset, transpose, rows, dtype)
    ends = np.cumsum(np.asarray(group_sizes))
    out = None
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        # An empty product has the right shape and type too.
        y = _one(x, values, scales, tensor_scale, x_scales, e, slice(start, end), *rest)
        out = np.zeros((x.shape[0], y.shape[1]), dtype) if out is None else out
        out[start:end] = y
    assert out is not None
    return out


def _one(x, values, scales, tensor_scale, x_scales, e, part, offset, transpose, rows, dtype):
    if scales is None:
        weight = np.asarray(values)[e].astype(dtype)
        return np.asarray(x)[part].astype(dtype) @ (weight.T if transpose else weight)
    return reference_quantized_matmul(
        np.asarray(x)[part],
        np.asarray(values)[e],
        np.asarray(scales)[e],
        tensor_scale=None if tensor_scale is None else np.asarray(tensor_scale)[e],
        x_scales=None if x_scales is None else np.asarray(x_scales)[part],
        offset=offset,
        transpose=transpose,
        rows=rows,
        dtype=dtype,
    )
