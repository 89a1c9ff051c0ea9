"""Weights of few bits as bytes of float8_e5m2, made on whole words, with scales after the dot.

A cast of int2 goes through 32-bit floats, one weight to a lane, and e2m1 is decoded at two to a
lane. Here a register of 32-bit words, 8 or 16 weights to a lane, becomes registers of bytes with a
few integer operations. The MXU takes such bytes in at twice the rate of bfloat16.

- 2 bits: code q + 2, in 0..3, set in as the mantissa of 2, is the float 2 + (q + 2) / 2 =
  q / 2 + 3. So q is 2 (V - 3), and q + 1/2 is 2 (V - 2.75), V being the byte's float: x's sum over
  each group, times `center`, is taken from the group's product.
- 4 bits: code q + 8 is 4 a + b, both of two bits, each plane of bytes as above: q is
  2 (4 V + V' - 14). Both are multiplied, by 4 x and by x, into one sum.
- e2m1: sign, exponent and mantissa move to where e5m2 has them. The subnormal 1/2 becomes a normal
  number on the way: whether the MXU keeps subnormals of float8 is written nowhere.
- Bytes come out in another order of rows than the words' own; x's columns are put in it first
  (`columns.order_rows`).
- A group of less than the MXU's depth would leave most of it idle: a tile as deep as the
  MXU is multiplied by one copy of x per group, zero outside its group, in one product.

>>> for factor, weights in planes(words_block, storage): ...
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.columns import WORD_BYTES
from tpu_stack.kernels.quantized_matmul.widen import Storage


def center(storage: Storage) -> float:
    """What the bytes' sum is taken less, before doubling, to be the weight; 0: they are it."""
    if storage.name == "codes4":
        return 0.0
    if storage.dtype == "int4":
        return 14.0
    return 2.75 if storage.name == "half" else 3.0


def unit(storage: Storage) -> float:
    """What 1 means in the bytes' sum less its `center`."""
    return 2.0**10 if storage.name == "codes4" else 2.0


def planes_of(storage: Storage) -> tuple[int, ...]:
    """The factor of each of `planes`."""
    return (4, 1) if storage.name == "integer" and storage.dtype == "int4" else (1,)


def planes(block: Array, storage: Storage) -> list[tuple[int, Array]]:
    """The weights [R, N] as float8_e5m2 of the same shape, each with its factor.

    R is a multiple of 128. The weight is `unit` times the sum of all, less the `center`.
    """
    words = pltpu.bitcast(block, jnp.int32)
    # Two's complement with its upper bit turned is q + 8 of four bits, and q + 2 of two.
    if storage.name == "codes4":
        made = [_float4_bytes(words)]
    elif storage.dtype == "int4":
        made = [_mantissas(words, (2, 6), turned=True), _mantissas(words, (0, 4), turned=False)]
    else:
        made = [_mantissas(words, (0, 2, 4, 6), turned=True)]
    return list(zip(planes_of(storage), made, strict=True))


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


def masked_copies(x: Array, codes: int, group: int) -> Array:
    """[M, K] in byte order -> [copies * M, K], copy i zero but for the columns of group i.

    codes: weights in a byte; 1 is x in its own order.
    """
    copies = max(x.shape[1] // group, 1)
    if copies == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    span = codes * WORD_BYTES
    row = lane // span * span + lane % WORD_BYTES * codes  # up to the order in a byte
    parts = [jnp.where(row // group == i, x, jnp.zeros_like(x)) for i in range(copies)]
    return jnp.concatenate(parts, 0)


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
