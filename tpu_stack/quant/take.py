"""The embedding lookup, for every storage of the table.

>>> rows = take(q_int8, jnp.zeros((2, 3), jnp.int32), jnp.bfloat16)
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import WORD_ROWS
from tpu_stack.quant.qtensor import QTensor


def take(w: Array | QTensor, ids: Int[Array, "*B"], dtype: Any = None) -> Float[Array, "*B D"]:
    """Rows `ids` of `w` [V, D]: the embedding lookup, for an array or a QTensor.

    Returns: [..., D] in `dtype`; when None, the array's dtype, or bfloat16 for a QTensor. A row
      outside the table is NaN rather than a neighbour; negative ids count from the end.
    """
    if not isinstance(w, QTensor):
        return jnp.take(w, ids, axis=0, mode="fill").astype(dtype or w.dtype)
    if w.rotation:
        raise UserError("take: rows of a rotated weight are mixed with their neighbours")
    rows = w.shape[0]
    ids = jnp.where(ids < 0, ids + rows, ids)
    scales = w.full_scales()
    if w.contract_axis == -2:
        scales, group = scales[:, 0], ids // w.group
    else:
        group = ids
    picked = _rows_of(w, ids) * jnp.take(scales, group, axis=0, mode="clip")
    inside = ((ids >= 0) & (ids < rows))[..., None]
    return jnp.where(inside, picked, jnp.nan).astype(dtype or jnp.bfloat16)


def _rows_of(w: QTensor, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Grid values of the rows `ids`, float32; any row's for ids outside."""
    if not w.packed_bits:
        return jnp.take(w.values, ids, axis=0, mode="clip").astype(jnp.float32) + w.offset
    words = jnp.take(w.values, 8 * (ids // WORD_ROWS) + ids % 8, axis=0, mode="clip")
    bit = ids % WORD_ROWS // 8
    return 2.0 * ((words >> bit[..., None]) & 1).astype(jnp.float32) - 1.0
