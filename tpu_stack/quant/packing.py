"""Quantized values as bytes on disk, with numpy only.

Layout 1: int8 is stored as it is. int4 is stored two to a byte along K, the second-minor axis:
row 2k in the low nibble and row 2k+1 in the high one, two's complement; an odd K gets a zero
nibble. This is the order of `pltpu.bitcast` on TPU.

>>> packed = pack_int4(values)  # int4 [..., K, N] -> uint8 [..., (K+1)//2, N]
"""

import ml_dtypes
import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import Format

LAYOUT_VERSION = 1


def pack_int4(values: np.ndarray) -> np.ndarray:
    """Packs int4 values [..., K, N] (int4 or any integer dtype) to uint8 [..., ceil(K/2), N].

    Raises: UserError when a value lies outside [-8, 7] or the array has under two axes.
    """
    wide = np.asarray(values).astype(np.int8)
    if wide.ndim < 2:
        raise UserError(f"pack_int4 needs [..., K, N], got {list(wide.shape)}")
    if values.dtype != ml_dtypes.int4:
        exact = np.asarray(values)
        if exact.size and (exact.min() < -8 or exact.max() > 7):
            raise UserError(f"pack_int4: values span {exact.min()}..{exact.max()}, not -8..7")
    if wide.shape[-2] % 2:
        wide = np.concatenate([wide, np.zeros_like(wide[..., :1, :])], axis=-2)
    nibbles = wide.view(np.uint8) & 0xF
    return nibbles[..., 0::2, :] | (nibbles[..., 1::2, :] << 4)


def unpack_int4(packed: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of `pack_int4`: uint8 [..., ceil(K/2), N] to int4 [..., K, N], K = `rows`.

    Raises: UserError when `packed` does not hold `rows` rows.
    """
    if packed.dtype != np.uint8 or packed.ndim < 2 or packed.shape[-2] != (rows + 1) // 2:
        raise UserError(
            f"unpack_int4: {packed.dtype} {list(packed.shape)} does not hold {rows} int4 rows"
        )
    *lead, half, columns = packed.shape
    low = (packed << 4).view(np.int8) >> 4  # arithmetic shifts extend the sign
    high = packed.view(np.int8) >> 4
    wide = np.stack([low, high], axis=-2).reshape(*lead, 2 * half, columns)
    return wide[..., :rows, :].astype(ml_dtypes.int4)


def pack_values(values: np.ndarray, fmt: Format) -> np.ndarray:
    """`values` of a QTensor of format `fmt` as the array written to disk."""
    if fmt.storage == "int4":
        return pack_int4(values)
    if fmt.storage == "int8":
        return np.ascontiguousarray(values, dtype=np.int8)
    raise UserError(f"format {fmt.name} has no packed layout in version {LAYOUT_VERSION}")


def unpack_values(packed: np.ndarray, fmt: Format, rows: int) -> np.ndarray:
    """The inverse of `pack_values`; `rows` is K, the second-minor size before packing."""
    if fmt.storage == "int4":
        return unpack_int4(packed, rows)
    if fmt.storage == "int8" and packed.dtype == np.int8 and packed.shape[-2] == rows:
        return packed
    raise UserError(f"{fmt.name}: {packed.dtype} {list(packed.shape)} does not hold {rows} rows")
