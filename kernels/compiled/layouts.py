"""Layouts of a compiled program's abstract operands: those that their producers give them.

Example:
    arguments = [with_layout(a, sharding) for a in arguments]
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout


def with_layout(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The abstract operand with `sharding`, and row-major layout for row scales, float32 [M, 1].

    `quantize_rows` writes row scales row-major; XLA's default layout for a parameter of that shape
    is transposed, and would add a copy.
    """
    place = Format(Layout((0, 1)), sharding) if is_row_factor(array) else sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def is_row_factor(array: Any) -> bool:
    """Whether the array is float32 [M, 1]."""
    return array.ndim == 2 and array.shape[1] == 1 and array.dtype == "float32"
