"""Low-bit weights decoded to float8_e5m2 bit planes with integer operations on packed words.

Mosaic casts int2 through float32, one weight per lane, and decodes e2m1 two to a lane. Here one
register of 32-bit words, 8 to 32 weights per lane, becomes registers of e5m2 bytes after a few
integer operations, and the MXU loads float8 weights at twice the rate of bfloat16. Scales are
applied after the product of each group.

- 2 bits: the code q + 2, in 0..3, becomes the mantissa of the float 2: V = 2 + (q + 2) / 2 =
  q / 2 + 3. So q = 2 (V - 3) and q + 1/2 = 2 (V - 2.75). The constant is subtracted after the
  product: the sum of x over each group, times `plane_offset`.
- 4 bits: the code q + 8 is 4 a + b with a and b of two bits, so two planes V and V':
  q = 2 (4 V + V' - 14). The MXU multiplies V by 4 x and V' by x into one sum.
- 1 bit: the bit becomes the sign of 1.
- e2m1: sign, exponent and mantissa move to their places in e5m2. The subnormal 1/2 becomes a normal
  number, because no document says whether the MXU flushes float8 subnormals.
- Planes hold the rows of the weight in another order (`columns.plane_row`); `permute_to_planes`
  puts the columns of x into it first.
- A group smaller than the MXU's depth would leave most of the MXU idle. One product therefore
  takes a tile as deep as the MXU and one copy of x per group, zero outside that group.

    for factor, weights in unpack_planes(w_ref, slice(0, 256), columns, storage): ...
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.columns import PLANE_ROWS, plane_row
from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS, Storage, as_stored


def plane_offset(storage: Storage) -> float:
    """The constant that the planes' sum exceeds the weight by; 0 where there is none.

    weight = `plane_multiplier` * (sum of factor * plane - `plane_offset`).
    """
    if storage.name in ("codes4", "signs"):
        return 0.0
    if storage.dtype == "int4":
        return 14.0
    return 2.75 if storage.name == "half" else 3.0


def plane_multiplier(storage: Storage) -> float:
    """The multiplier in the formula of `plane_offset`."""
    return {"codes4": 2.0**10, "signs": 1.0}.get(storage.name, 2.0)


def plane_factors(storage: Storage) -> tuple[int, ...]:
    """The factor of each plane of `unpack_planes`, in the formula of `plane_offset`."""
    return (4, 1) if storage.name == "integer" and storage.dtype == "int4" else (1,)


def unpack_planes(
    w_ref: Any, rows: slice, columns: slice, storage: Storage
) -> list[tuple[int, Array]]:
    """Decodes rows of the block to (factor, float8_e5m2 [rows, columns]) pairs, one per plane.

    Rows are in plane order (`columns.plane_row`); `rows` starts and stops at multiples of 128. The
    formula of `plane_offset` gives the weight.
    """
    if storage.name == "signs":
        words = range(rows.start // WORD_ROWS, -(-rows.stop // WORD_ROWS))
        bits = rows.start % WORD_ROWS // PLANE_ROWS, (rows.stop - 1) % WORD_ROWS // PLANE_ROWS + 1
        blocks = [w_ref[word * 8 : word * 8 + 8, columns] for word in words]
        return [(1, _signs(blocks, range(*bits)))]
    words = pltpu.bitcast(as_stored(w_ref[rows, columns], storage), jnp.int32)
    # Two's complement with its upper bit flipped is q + 8 for four bits and q + 2 for two.
    if storage.name == "codes4":
        made = [_float4_bytes(words)]
    elif storage.dtype == "int4":
        made = [_mantissas(words, (2, 6), flip=True), _mantissas(words, (0, 4), flip=False)]
    else:
        made = [_mantissas(words, (0, 2, 4, 6), flip=True)]
    return list(zip(plane_factors(storage), made, strict=True))


def _signs(words: list[Array], bits: range) -> Array:
    """+1 and -1 in float8_e5m2 from bits `bits` of each byte of the words, register by register."""
    parts = []
    for word in words:
        for bit in bits:
            moved = jnp.left_shift(word, jnp.int32(7 - bit)) if bit < 7 else word
            parts.append((moved & _each(0x80)) ^ _each(0xBC))  # e5m2's -1; a one bit flips the sign
    return _as_float8(parts)


def _mantissas(words: Array, places: tuple[int, ...], flip: bool) -> Array:
    """Two bits from each of the `places` in a byte, as the mantissa of e5m2's 2, which is 0x40.

    With n places, place j of byte b in word r holds row n (4 r + b) + j of each 32 n rows, and ends
    at row 32 j + 4 r + b of the plane.
    """
    parts = []
    for word in _registers(words):
        for place in places:
            moved = _down(word, place) if place else word
            parts.append((moved & _each(0x03)) ^ _each(0x42 if flip else 0x40))
    return _as_float8(parts)


def _float4_bytes(words: Array) -> Array:
    """2^-10 times the value of each e2m1 code, rows in the order of `_mantissas` of two places.

    The magnitude bits eem become 1eem: e5m2's exponent 4 + ee and mantissa m. The subnormal 001
    becomes 1000, which is half of 010's 1010; 000 stays zero.
    """
    parts = []
    for word in _registers(words):
        magnitude = word & _each(0x77)
        not_zero = (magnitude + _each(0x77)) & _each(
            0x88
        )  # carries into the sign bit when magnitude >= 1
        normal = _down(magnitude + _each(0x66), 3)  # and into the mantissa bit when magnitude >= 2
        code = (magnitude & (normal | _each(0xEE))) | not_zero
        low = jnp.left_shift(code & _each(0x0F), 1) | jnp.left_shift(word & _each(0x08), 4)
        high = _down(code & _each(0xF0), 3) | (word & _each(0x80))
        parts += [low, high]
    return _as_float8(parts)


def _registers(words: Array) -> list[Array]:
    return [words[row : row + 8] for row in range(0, words.shape[0], 8)]


def _each(byte: int) -> Array:
    """An int32 with `byte` in each of its four bytes."""
    word = byte * 0x01010101
    return jnp.int32(word - 2**32 if word >= 2**31 else word)


def _down(words: Array, bits: int) -> Array:
    return jax.lax.shift_right_logical(words, jnp.int32(bits))


def _as_float8(parts: list[Array]) -> Array:
    return jnp.concatenate([pltpu.bitcast(part, jnp.float8_e5m2) for part in parts], 0)


def groups_in(rows: slice, codes: int, group: int) -> list[int]:
    """Indices of the groups that have a row among rows `rows` of the plane order.

    codes: weights in a stored byte; 1 means that rows keep the order of the weight.
    """
    place = np.arange(rows.start, rows.stop)
    return np.unique((place if codes == 1 else plane_row(place, codes)) // group).tolist()


def masked_copies(x: Array, rows: slice, codes: int, group: int) -> Array:
    """[copies * M, columns]: a copy of columns `rows` of x for each of `groups_in(rows, codes,
    group)`, zero outside that group. x has its columns in plane order."""
    part, first = x[:, rows], rows.start % WORD_ROWS  # the same masks for all tiles
    groups = groups_in(slice(first, first + part.shape[1]), codes, group)
    if len(groups) == 1:
        return part
    place = first + jax.lax.broadcasted_iota(jnp.int32, part.shape, 1)
    found = (place if codes == 1 else plane_row(place, codes)) // group
    return jnp.concatenate([jnp.where(found == i, part, jnp.zeros_like(part)) for i in groups], 0)


def offset_product(sums: Array, scales: Array) -> Float[Array, "M N"]:
    """float32 sums [M, G] @ scales [G, N] in float32; scales are bfloat16 or float32."""
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
