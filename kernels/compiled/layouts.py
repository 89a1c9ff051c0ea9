"""Where a program's arguments lie, as those who make them leave them.

Example:
    arguments = [with_layout(a, sharding) for a in arguments]
"""

from typing import Any

import jax
from jax.experimental.layout import Format, Layout


def with_layout(array: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The abstract operand on the device. A factor per row, float32 [M, 1], lies as the kernel that
    makes it leaves it, row by row: XLA would have a parameter of that shape come transposed, and
    copy it.
    """
    place = Format(Layout((0, 1)), sharding) if is_row_factor(array) else sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def is_row_factor(array: Any) -> bool:
    """Whether it is float32 [M, 1]."""
    return array.ndim == 2 and array.shape[1] == 1 and array.dtype == "float32"
