"""From a block of a weight as stored to the operand that the MXU multiplies, inside a kernel.

One function per way of storing. Each takes a block that is already in registers and returns the
same rows in a dtype of the MXU; most mean the value itself, some twice the value (`Storage.unit`).

>>> storage = storage_of(values.dtype, offset=0.5)
>>> w = widen(values_ref[...], storage, jnp.bfloat16)  # times storage.unit(jnp.bfloat16)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

WORD_ROWS = 256
"""Rows of a 1-bit weight that one tile of 8 rows of int32 words holds."""


@dataclass(frozen=True)
class Storage:
    """How a weight lies in memory.

    Attributes:
      name: "integer" (two's complement of 2, 4 or 8 bits), "half" (2 bits, q means q + 1/2),
        "float8", "float4" (e2m1 that the chip casts), "codes4" (e2m1 seen as int4 and decoded with
        integer arithmetic) or "signs" (32 rows to an int32 word, bit 1 is +1 and bit 0 is -1).
      dtype: dtype name of the stored array as the kernel sees it.
      rows: rows of the weight in one row of the stored array.
    """

    name: str
    dtype: str
    rows: int = 1

    @property
    def bits(self) -> int:
        """Bits that one weight takes in memory."""
        if self.name == "signs":
            return 1
        return {"int2": 2, "int4": 4, "float4_e2m1fn": 4, "bfloat16": 16}.get(self.dtype, 8)

    @property
    def step(self) -> int:
        """What a block's rows must be a multiple of."""
        return WORD_ROWS if self.name == "signs" else 128

    def exact_in(self, dtype: Any) -> bool:
        """Whether `widen` to this dtype loses nothing."""
        name = jnp.dtype(dtype).name
        if name in ("bfloat16", "float32") or (name == self.dtype and self.name != "half"):
            return True
        if name == "int8":
            return self.name not in ("float8", "float4")
        narrow = self.name != "float8" and self.dtype != "int8"  # at most three significant bits
        return name in ("float8_e4m3fn", "float8_e5m2") and narrow

    def unit(self, dtype: Any) -> float:
        """What 1 means after widening to `dtype`: 0.5 where `widen` returns twice the value."""
        return 0.5 if self.name == "codes4" or self.adds_ones(dtype) else 1.0

    def adds_ones(self, dtype: Any) -> bool:
        """Whether `widen` to `dtype` returns q for q + 1/2: no chip adds int8.

        x @ (q + 1/2) is then half of 2 x @ q + x @ 1.
        """
        return self.name == "half" and jnp.dtype(dtype) == jnp.int8


def storage_of(dtype: Any, offset: float = 0.0, casts_float4: bool = False) -> Storage:
    """The storage of values of `dtype`; `casts_float4` where the chip widens e2m1 itself.

    Raises: ValueError for a dtype that no weight is stored in, or an offset it cannot have.
    """
    name = jnp.dtype(dtype).name
    if offset not in (0.0, 0.5) or (offset and name != "int2"):
        raise ValueError(f"offset {offset} with values of {name}; supported: 0, or 0.5 with int2")
    if name in ("int8", "int4", "int2"):
        return Storage("half" if offset else "integer", name)
    if name in ("float8_e4m3fn", "float8_e5m2"):
        return Storage("float8", name)
    if name == "float4_e2m1fn":
        return Storage("float4", name) if casts_float4 else Storage("codes4", "int4")
    if name == "int32":
        return Storage("signs", name, 32)
    raise ValueError(
        f"values is {name}; supported: int8, int4, int2, float8_e4m3fn, float8_e5m2, "
        "float4_e2m1fn, int32 (words of 32 signs)"
    )


def as_stored(values: Array, storage: Storage) -> Array:
    """`values` in the dtype the kernel sees: e2m1 as int4, without a copy, where no cast exists."""
    if storage.name == "codes4":
        return jax.lax.bitcast_convert_type(values, jnp.int4)
    return values


def widen(block: Array, storage: Storage, dtype: Any) -> Array:
    """The block's weights [rows, columns] in `dtype`, in units of `storage.unit(dtype)`.

    Args:
      block: [rows / storage.rows, columns] in `storage.dtype`.
      dtype: bfloat16, float32, int8, float8_e4m3fn, or the stored dtype itself.
    """
    dtype = jnp.dtype(dtype)
    if dtype == block.dtype and storage.name in ("integer", "float8"):
        return block
    return _WIDEN[storage.name](block, dtype)


def _integer(block: Array, dtype: jnp.dtype) -> Array:
    return block.astype(dtype)


def _half(block: Array, dtype: jnp.dtype) -> Array:
    if dtype == jnp.int8:  # see `Storage.adds_ones`
        return block.astype(dtype)
    wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    return (block.astype(wide) + jnp.asarray(0.5, wide)).astype(dtype)


def _float(block: Array, dtype: jnp.dtype) -> Array:
    return block.astype(dtype)


def _codes4(block: Array, dtype: jnp.dtype) -> Array:
    """Twice e2m1's value from its code: magnitudes 0..7 mean 0, 1, 2, 3, 4, 6, 8, 12.

    That is m + max(m - 4, 0) + 2 max(m - 6, 0), two exact steps of a float that was 0..7 before.
    """
    wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    code = block.astype(wide)  # -8..7, sign bit as two's complement: negative codes are m - 8
    m = jnp.where(code < 0, code + 8, code)
    twice = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    return jnp.where(code < 0, -twice, twice).astype(dtype)


def _signs(block: Array, dtype: jnp.dtype) -> Array:
    """+1 and -1: bit j of a tile of 8 word rows is 8 consecutive rows, and its sign the float's."""
    words, columns = block.shape
    tiles = block.reshape(words // 8, 1, 8, columns)
    place = 31 - jax.lax.broadcasted_iota(jnp.int32, (1, 32, 1, 1), 1)
    sign = jnp.left_shift(tiles, place) & jnp.int32(-(2**31))
    minus_one = jnp.int32(0xBF800000 - 2**32)
    ones = jax.lax.bitcast_convert_type(sign ^ minus_one, jnp.float32)
    ones = ones.reshape(words * 32, columns)
    return ones.astype(jnp.int32).astype(dtype) if dtype == jnp.int8 else ones.astype(dtype)


_WIDEN = {
    "integer": _integer,
    "half": _half,
    "float8": _float,
    "float4": _float,
    "codes4": _codes4,
    "signs": _signs,
}
