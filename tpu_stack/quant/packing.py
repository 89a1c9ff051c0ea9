"""Quantized values as bytes on disk, with numpy only.

Layout 2. 8-bit values and the words of one-bit values are stored as they are. Smaller ones share
bytes along K, the second-minor axis, lowest bits first: for 4 bits, row 2k in the low nibble and
row 2k+1 in the high one; for 2 bits, rows 4k..4k+3. Integers are two's complement, floats their bit
pattern; a last byte is filled up with zero bits. This is the order of `pltpu.bitcast` on TPU.
Layout 1 was the same for int8 and int4, and had no others.

>>> from tpu_stack.quant import get_format
>>> pack_values(np.array([[1], [-2], [3]], jnp.int4), get_format("int4")).tolist()
[[225], [3]]
"""

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import Format

LAYOUT_VERSION = 2


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes under 2**bits [..., K, N] as bytes [..., ceil(K * bits / 8), N]; bits 2 or 4."""
    per_byte = 8 // bits
    *lead, rows, columns = codes.shape
    missing = -rows % per_byte
    if missing:
        zeros = np.zeros((*lead, missing, columns), np.uint8)
        codes = np.concatenate([codes, zeros], axis=-2)
    packed = codes[..., 0::per_byte, :].copy()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte, :] << np.uint8(bits * place)
    return packed


def unpack_rows(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """The inverse of `pack_rows`: uint8 codes [..., K, N], K = `rows`."""
    per_byte = 8 // bits
    *lead, stored, columns = packed.shape
    codes = np.empty((*lead, stored, per_byte, columns), np.uint8)
    for place in range(per_byte):
        codes[..., place, :] = (packed >> np.uint8(bits * place)) & np.uint8(2**bits - 1)
    return codes.reshape(*lead, stored * per_byte, columns)[..., :rows, :]


def pack_values(values: np.ndarray, fmt: Format) -> np.ndarray:
    """`values` of a QTensor of format `fmt` as the array written to disk.

    Raises: UserError for values of another dtype (widened ones), fewer than two axes, or a format
      that is not quantized.
    """
    if not fmt.quantized:
        raise UserError(f"format {fmt.name} has no packed layout in version {LAYOUT_VERSION}")
    if values.dtype != fmt.dtype or values.ndim < 2:
        raise UserError(
            f"{fmt.name} packs {fmt.dtype} [..., K, N], not {values.dtype} {list(values.shape)}"
        )
    if fmt.bits not in (2, 4):
        return np.ascontiguousarray(values)
    mask = np.uint8(2**fmt.bits - 1)
    if fmt.kind == "float":
        return pack_rows(np.ascontiguousarray(values).view(np.uint8) & mask, fmt.bits)
    return pack_rows(values.astype(np.int8).view(np.uint8) & mask, fmt.bits)


def unpack_values(packed: np.ndarray, fmt: Format, rows: int) -> np.ndarray:
    """The inverse of `pack_values`; `rows` is K, the weight's second-minor size.

    Raises: UserError when `packed` does not hold `rows` rows.
    """
    shares = fmt.bits in (2, 4)
    dtype = np.dtype(np.uint8) if shares else fmt.dtype
    stored = fmt.column_bytes(rows) if shares else fmt.rows_stored(rows)
    if not fmt.quantized or packed.dtype != dtype or packed.ndim < 2 or packed.shape[-2] != stored:
        raise UserError(
            f"{fmt.name}: {packed.dtype} {list(packed.shape)} does not hold {rows} rows"
        )
    if not shares:
        return packed
    codes = unpack_rows(packed, fmt.bits, rows)
    if fmt.kind == "float":
        return np.ascontiguousarray(codes).view(fmt.dtype)
    signed = (codes << np.uint8(8 - fmt.bits)).view(np.int8) >> np.int8(8 - fmt.bits)
    return signed.astype(fmt.dtype)
