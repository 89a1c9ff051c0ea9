"""Validation of a call's arrays: dtypes, the shape of the weight, the size of its groups.

>>> group_of((4096, 512), (128, 1, 512))
32
"""

from typing import Any

import jax.numpy as jnp

from tpu_stack.kernels.quantized_matmul.blocks import SUBLANES
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage

X_DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
SCALE_DTYPES = ("bfloat16", "float32", "float8_e8m0fnu", "float8_e4m3fn")


def check_dtypes(x: Any, scales: Any, tensor_scale: Any, x_scales: Any, out_dtype: Any) -> Any:
    """The result's dtype. Raises: ValueError for dtypes and shapes that no kernel takes."""
    narrow = jnp.dtype(x.dtype).name in ("float8_e4m3fn", "int8")
    if x_scales is not None and x_scales.shape != (x.shape[0], 1):
        raise ValueError(f"x_scales is {x_scales.shape}; x {x.shape} needs {(x.shape[0], 1)}")
    if tensor_scale is not None and tensor_scale.size != 1:
        raise ValueError(f"tensor_scale is {tensor_scale.shape}; it must be one number")
    out = jnp.dtype(out_dtype or (jnp.bfloat16 if narrow else x.dtype))
    for what, dtype, allowed in (
        ("x", x.dtype, X_DTYPES),
        ("scales", scales.dtype, SCALE_DTYPES),
        ("out_dtype", out, ("bfloat16", "float32")),
        ("x_scales", getattr(x_scales, "dtype", jnp.float32), ("float32",)),
        ("tensor_scale", getattr(tensor_scale, "dtype", jnp.float32), ("float32",)),
    ):
        if jnp.dtype(dtype).name not in allowed:
            raise ValueError(f"{what} is {jnp.dtype(dtype).name}; supported: {', '.join(allowed)}")
    return out


def logical_shape(
    x: Any, values: Any, scales: Any, storage: Storage, transpose: bool, rows: int | None
) -> tuple[int, int]:
    """(rows, columns) of the weight, which for 1-bit words differs from the array's shape."""
    stored, columns = values.shape
    if storage.name != "signs":
        return stored, columns
    held: int = scales.shape[0] if scales.ndim == 2 else stored * storage.rows
    rows = (rows or int(held)) if transpose else int(x.shape[1])
    if stored != SUBLANES * -(-rows // WORD_ROWS):
        raise ValueError(
            f"{stored} rows of int32 words do not hold {rows} rows of signs, which take "
            f"{SUBLANES * -(-rows // WORD_ROWS)}"
        )
    return rows, columns


def group_of(values: tuple[int, int], scales: tuple[int, ...]) -> int:
    """Rows of the weight that share a scale; 0 for one scale per row.

    values, scales: shapes.

    Raises: ValueError for scales that do not fit.
    """
    rows, columns = values
    if scales == (rows, 1):
        return 0
    if len(scales) == 3 and scales[1:] == (1, columns) and scales[0] and rows % scales[0] == 0:
        return rows // scales[0]
    raise ValueError(
        f"scales {scales} fit values {values} neither as [G, 1, {columns}] with G dividing "
        f"{rows} nor as [{rows}, 1]"
    )
