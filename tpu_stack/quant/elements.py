"""From grid values to what is stored and back, for integers, small floats and packed bits.

Packed bits: 256 rows of +-1 are eight rows of 32-bit words. Row k is bit (k % 256) // 8 of word row
8 * (k // 256) + k % 8, so bit j of eight word rows is eight consecutive rows, in order: a kernel
unpacks whole vector registers without shuffling. Rows past K are zero bits.

>>> from tpu_stack.quant import get_format
>>> grid = nearest(jnp.array([[-1.6], [2.4]]), get_format("int4"))
>>> decode(encode(grid, get_format("int4")), get_format("int4"), rows=2).tolist()
[[-2.0], [2.0]]
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from tpu_stack.quant.formats import WORD_ROWS, Format


def nearest(u: Float[Array, "*B"], fmt: Format) -> Float[Array, "*B"]:
    """The grid value nearest to each finite `u`, float32, saturating.

    Ties go to the even stored integer or the even mantissa; one bit takes zero as +1.
    """
    if fmt.kind == "bits":
        return jnp.where(u >= 0, 1.0, -1.0)
    if fmt.kind == "float":
        return jnp.clip(u, fmt.low, fmt.high).astype(fmt.dtype).astype(jnp.float32)
    return jnp.clip(jnp.round(u - fmt.offset) + fmt.offset, fmt.low, fmt.high)


def encode(grid: Float[Array, "*L K N"], fmt: Format) -> Array:
    """Grid values as stored: [..., K, N], or words [..., 8*ceil(K/256), N]."""
    if fmt.kind == "bits":
        return pack_words(grid > 0)
    return (grid - fmt.offset).astype(fmt.dtype)


def decode(values: Array, fmt: Format, rows: int) -> Float[Array, "*L K N"]:
    """The inverse of `encode`, float32; `rows` is K."""
    if fmt.kind == "bits":
        return 2.0 * unpack_words(values, rows).astype(jnp.float32) - 1.0
    return values.astype(jnp.float32) + fmt.offset


def widened_dtype(fmt: Format) -> jnp.dtype:
    """dtype of `widen`'s values: bfloat16 for 8-bit floats, int8 for everything else."""
    return jnp.dtype(jnp.bfloat16 if fmt.kind == "float" and fmt.bits == 8 else jnp.int8)


def widened_unit(fmt: Format) -> float:
    """What 1 among `widen`'s values stands for, in grid values."""
    halves = fmt.offset or (fmt.kind == "float" and fmt.bits == 4)
    return 0.5 if halves else 1.0


def widen(values: Any, fmt: Format, rows: int) -> Array:
    """Stored values [..., K, N] as multiples of `widened_unit`, exactly. numpy stays numpy."""
    if fmt.kind == "bits":
        return 2 * unpack_words(values, rows) - np.int8(1)
    if fmt.kind == "float" and fmt.bits == 8:
        return values.astype(widened_dtype(fmt))
    if fmt.kind == "float":  # e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6
        return (2 * values.astype(np.float32)).astype(np.int8)
    wide = values.astype(np.int8)
    return 2 * wide + np.int8(1) if fmt.offset else wide


def pack_words(bits: Any) -> Int[Array, "*L W N"]:
    """Booleans [..., K, N] as int32 words [..., 8*ceil(K/256), N]. numpy stays numpy."""
    xp: Any = np if isinstance(bits, np.ndarray) else jnp
    *lead, rows, columns = bits.shape
    blocks = -(-rows // WORD_ROWS)
    padding = [(0, 0)] * len(lead) + [(0, blocks * WORD_ROWS - rows), (0, 0)]
    split = xp.pad(bits, padding).reshape(*lead, blocks, 32, 8, columns).astype(np.uint32)
    shifts = np.arange(32, dtype=np.uint32).reshape(*[1] * (len(lead) + 1), 32, 1, 1)
    words = (split << shifts).sum(-3, dtype=np.uint32)
    return words.reshape(*lead, 8 * blocks, columns).astype(np.int32)


def unpack_words(words: Any, rows: int) -> Int8[Array, "*L K N"]:
    """The bits of `pack_words`, 0 or 1 [..., K, N], K = `rows`. numpy stays numpy."""
    *lead, stored, columns = words.shape
    split = words.reshape(*lead, stored // 8, 8, columns)
    if isinstance(words, np.ndarray):  # bit by bit: 32 wide copies would not fit a large model
        bits: Any = np.empty((*lead, stored // 8, 32, 8, columns), np.int8)
        for bit in range(32):
            bits[..., bit, :, :] = (split >> bit) & 1
    else:
        shifts = np.arange(32, dtype=np.int32).reshape(*[1] * (len(lead) + 1), 32, 1, 1)
        bits = ((split[..., None, :, :] >> shifts) & 1).astype(np.int8)
    return bits.reshape(*lead, stored * 32, columns)[..., :rows, :]
