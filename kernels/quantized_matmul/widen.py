"""Decode a block of a stored weight, inside a kernel, to a dtype that the MXU multiplies.

One function per encoding. Each takes a block in registers and returns the same rows as the MXU's
operand: the values, or twice the values where `Storage.multiplier` is 1/2.

>>> widen(jnp.array([[-2, 1]], jnp.int2), storage_of("int2", offset=0.5), jnp.bfloat16)
Array([[-1.5, 1.5]], dtype=bfloat16)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

WORD_ROWS = 256
"""Rows of a 1-bit weight in one tile of 8 rows of int32 words."""


@dataclass(frozen=True)
class Storage:
    """The encoding of a weight in memory.

    Attributes:
      name: "integer" (two's complement of 2, 4 or 8 bits), "half" (2 bits, q means q + 1/2),
        "float8", "float4" (e2m1, which the chip casts), "codes4" (e2m1 bitcast to int4 and decoded
        arithmetically) or "signs" (32 rows per int32 word, bit 1 is +1 and bit 0 is -1).
      dtype: dtype name of the stored array inside the kernel.
      rows: rows of the weight in one row of the stored array.
    """

    name: str
    dtype: str
    rows: int = 1

    @property
    def bits(self) -> int:
        """Bits per weight in memory."""
        if self.name == "signs":
            return 1
        return {"int2": 2, "int4": 4, "float4_e2m1fn": 4, "bfloat16": 16}.get(self.dtype, 8)

    @property
    def step(self) -> int:
        """A block's rows must be a multiple of this."""
        return WORD_ROWS if self.name == "signs" else 128

    def exact_in(self, dtype: Any) -> bool:
        """Whether `widen` to this dtype is exact."""
        name = jnp.dtype(dtype).name
        if name in ("bfloat16", "float32") or (name == self.dtype and self.name != "half"):
            return True
        if name == "int8":
            return self.name not in ("float8", "float4")
        narrow = self.name != "float8" and self.dtype != "int8"  # at most three significant bits
        return name in ("float8_e4m3fn", "float8_e5m2") and narrow

    def multiplier(self, dtype: Any) -> float:
        """weight = multiplier * `widen(..., dtype)`: 0.5 where `widen` returns twice the value."""
        return 0.5 if self.name == "codes4" or self.adds_ones(dtype) else 1.0

    def adds_ones(self, dtype: Any) -> bool:
        """Whether `widen` to `dtype` returns q for q + 1/2, since no chip adds int8.

        The kernel then computes x @ (q + 1/2) as (2 x @ q + x @ 1) / 2.
        """
        return self.name == "half" and jnp.dtype(dtype) == jnp.int8


def storage_of(dtype: Any, offset: float = 0.0, casts_float4: bool = False) -> Storage:
    """The encoding of values of `dtype`; casts_float4: the chip casts e2m1 itself.

    Raises: ValueError for a dtype or offset that no format has.
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
    """`values` in `storage.dtype`: e2m1 bitcast to int4 where the chip cannot cast it."""
    if storage.name == "codes4":
        return jax.lax.bitcast_convert_type(values, jnp.int4)
    return values


def widen(block: Array, storage: Storage, dtype: Any) -> Array:
    """The block's weights [rows, columns] in `dtype`, divided by `storage.multiplier(dtype)`.

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
    """Twice e2m1's value from its code: magnitude codes m = 0..7 map to 0, 1, 2, 3, 4, 6, 8, 12.

    That is m + max(m - 4, 0) + 2 max(m - 6, 0), exact in bfloat16.
    """
    wide = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    code = block.astype(
        wide
    )  # -8..7: the sign bit read as two's complement makes negative codes m - 8
    m = jnp.where(code < 0, code + 8, code)
    twice = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    return jnp.where(code < 0, -twice, twice).astype(dtype)


def _signs(block: Array, dtype: jnp.dtype) -> Array:
    """+1 and -1: bit j of 8 word rows holds 8 consecutive rows and becomes their sign bit."""
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
