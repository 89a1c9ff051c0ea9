"""Weights of few bits as bytes of float8_e5m2, made on whole words, with scales after the dot.

A cast of int2 goes through 32-bit floats, one weight to a lane, and e2m1 is decoded at two to a
lane. Here a register of 32-bit words, 8 to 32 weights to a lane, becomes registers of bytes with a
few integer operations. The MXU takes such bytes in at twice the rate of bfloat16.

- 2 bits: code q + 2, in 0..3, set in as the mantissa of 2, is the float 2 + (q + 2) / 2 =
  q / 2 + 3. So q is 2 (V - 3), and q + 1/2 is 2 (V - 2.75), V being the byte's float: x's sum over
  each group, times `center`, is taken from the group's product.
- 4 bits: code q + 8 is 4 a + b, both of two bits, each plane of bytes as above: q is
  2 (4 V + V' - 14). Both are multiplied, by 4 x and by x, into one sum.
- 1 bit: moved to the sign of 1.
- e2m1: sign, exponent and mantissa move to where e5m2 has them. The subnormal 1/2 becomes a normal
  number on the way: whether the MXU keeps subnormals of float8 is written nowhere.
- Bytes come out in another order of rows than the words' own; x's columns are put in it first
  (`columns.order_rows`).
- A group of less than the MXU's depth would leave most of it idle: a tile as deep as the
  MXU is multiplied by one copy of x per group, zero outside its group, in one product.

>>> for factor, weights in planes(w_ref, slice(0, 256), columns, storage): ...
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.columns import WORD_BYTES, row_at
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage, as_stored


def center(storage: Storage) -> float:
    """What the bytes' sum is taken less, before doubling, to be the weight; 0: they are it."""
    if storage.name in ("codes4", "signs"):
        return 0.0
    if storage.dtype == "int4":
        return 14.0
    return 2.75 if storage.name == "half" else 3.0


def unit(storage: Storage) -> float:
    """What 1 means in the bytes' sum less its `center`."""
    return {"codes4": 2.0**10, "signs": 1.0}.get(storage.name, 2.0)


def planes_of(storage: Storage) -> tuple[int, ...]:
    """The factor of each of `planes`."""
    return (4, 1) if storage.name == "integer" and storage.dtype == "int4" else (1,)


def planes(w_ref: Any, rows: slice, columns: slice, storage: Storage) -> list[tuple[int, Array]]:
    """These rows of the block, in the order of bytes, as float8_e5m2; each plane with its factor.

    Rows start and stop at multiples of 128. The weight is `unit` times the sum of all planes times
    their factors, less the `center`.
    """
    if storage.name == "signs":
        words = range(rows.start // WORD_ROWS, -(-rows.stop // WORD_ROWS))
        bits = rows.start % WORD_ROWS // WORD_BYTES, (rows.stop - 1) % WORD_ROWS // WORD_BYTES + 1
        blocks = [w_ref[word * 8 : word * 8 + 8, columns] for word in words]
        return [(1, _signs(blocks, range(*bits)))]
    words = pltpu.bitcast(as_stored(w_ref[rows, columns], storage), jnp.int32)
    # Two's complement with its upper bit turned is q + 8 of four bits, and q + 2 of two.
    if storage.name == "codes4":
        made = [_float4_bytes(words)]
    elif storage.dtype == "int4":
        made = [_mantissas(words, (2, 6), turned=True), _mantissas(words, (0, 4), turned=False)]
    else:
        made = [_mantissas(words, (0, 2, 4, 6), turned=True)]
    return list(zip(planes_of(storage), made, strict=True))


def _signs(words: list[Array], bits: range) -> Array:
    """+1 and -1 from the bits of each byte, registers of words one after the other."""
    parts = []
    for word in words:
        for bit in bits:
            moved = jnp.left_shift(word, jnp.int32(7 - bit)) if bit < 7 else word
            parts.append((moved & _each(0x80)) ^ _each(0xBC))  # e5m2's -1, turned by a one
    return _as_float8(parts)


def _mantissas(words: Array, places: tuple[int, ...], turned: bool) -> Array:
    """Two bits from each of the places in a byte, as the mantissa of e5m2's 2, which is 0x40.

    Row 4 i r + i b + j, i the number of places, comes out at 32 j + 4 r + b of each 32 i rows: byte
    b of word r, place j.
    """
    parts = []
    for word in _registers(words):
        for place in places:
            moved = _down(word, place) if place else word
            parts.append((moved & _each(0x03)) ^ _each(0x42 if turned else 0x40))
    return _as_float8(parts)


def _float4_bytes(words: Array) -> Array:
    """2^-10 times the value of each e2m1 code, rows in the order of `_mantissas` of two places.

    A magnitude of bits eem becomes 1eem: that is e5m2's exponent 4 + ee and mantissa m. 001, the
    subnormal, becomes 1000, half of 010's 1010; and 000 stays zero.
    """
    parts = []
    for word in _registers(words):
        magnitude = word & _each(0x77)
        not_zero = (magnitude + _each(0x77)) & _each(0x88)  # carries to the sign's place from 1 on
        normal = _down(magnitude + _each(0x66), 3)  # and from 2 on, to the mantissa's
        code = (magnitude & (normal | _each(0xEE))) | not_zero
        low = jnp.left_shift(code & _each(0x0F), 1) | jnp.left_shift(word & _each(0x08), 4)
        high = _down(code & _each(0xF0), 3) | (word & _each(0x80))
        parts += [low, high]
    return _as_float8(parts)


def _registers(words: Array) -> list[Array]:
    return [words[row : row + 8] for row in range(0, words.shape[0], 8)]


def _each(byte: int) -> Array:
    """The byte in all four bytes of an int32."""
    word = byte * 0x01010101
    return jnp.int32(word - 2**32 if word >= 2**31 else word)


def _down(words: Array, bits: int) -> Array:
    return jax.lax.shift_right_logical(words, jnp.int32(bits))


def _as_float8(parts: list[Array]) -> Array:
    return jnp.concatenate([pltpu.bitcast(part, jnp.float8_e5m2) for part in parts], 0)


def groups_of(rows: slice, codes: int, group: int) -> list[int]:
    """The groups that these places of the order in bytes have rows of; 1 is x's own order."""
    place = np.arange(rows.start, rows.stop)
    return np.unique((place if codes == 1 else row_at(place, codes)) // group).tolist()


def masked_copies(x: Array, rows: slice, codes: int, group: int) -> Array:
    """x's columns `rows` in byte order -> [copies * M, columns], each zero but for one of
    `groups_of(rows, codes, group)`."""
    part, first = x[:, rows], rows.start % WORD_ROWS  # the same masks for all tiles
    groups = groups_of(slice(first, first + part.shape[1]), codes, group)
    if len(groups) == 1:
        return part
    place = first + jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
    found = (place if codes == 1 else row_at(place, codes)) // group
    return jnp.concatenate([jnp.where(found == i, part, jnp.zeros_like(part)) for i in groups], 0)


def group_offsets(sums: Array, scales: Array) -> Float[Array, "M N"]:
    """sums [M, G] @ scales [G, N], bfloat16 or float32, in float32."""
    dims = (((1,), (0,)), ((), ()))
    if scales.dtype != jnp.bfloat16:
        highest = jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(sums, scales, dims, highest, preferred_element_type=jnp.float32)
    parts = []
    for _ in range(3):  # three bfloat16 hold a float32's 24 bits
        parts.append(sums.astype(jnp.bfloat16))
        sums = sums - parts[-1].astype(jnp.float32)
    left = jnp.concatenate(parts, 0)
    y = jax.lax.dot_general(left, scales, dims, preferred_element_type=jnp.float32)
    rows = sums.shape[0]
    return y[:rows] + y[rows : 2 * rows] + y[2 * rows :]
