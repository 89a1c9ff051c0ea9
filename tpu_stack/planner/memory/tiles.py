"""How many bytes an array takes in a TPU's memory, where the last two axes come in tiles.

XLA:TPU lays float32 out in tiles of 8 x 128, narrower types in tiles of as many 32-bit words: a
last axis of 48 is padded to 128, which is where memory goes that no shape shows. Rows fewer than a
tile's are padded to the next power of two only (libtpu 0.0.52: `T(2,128)`, `T(4,128)`).

>>> tiled_bytes([16, 100], 32, [8, 128])
8192
"""

from collections.abc import Sequence
from itertools import permutations
from math import prod

LANES = 128
SUBLANES = 8


def tiled_bytes(shape: Sequence[int], bits: int, tile: Sequence[int]) -> int:
    """Bytes of an array whose last axes, major to minor, are padded to whole tiles.

    Args:
      shape: sizes in order of memory. bits: of an element. tile: sizes of a tile, [] for none.
    """
    sizes = list(shape) or [1]
    sizes = [1] * (len(tile) - len(sizes)) + sizes
    for back, size in enumerate(reversed(tile), start=1):
        sizes[-back] = -(-sizes[-back] // size) * size
    return (prod(sizes) * bits + 7) // 8


def padded_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of an array in the layout that pads it least, which XLA:TPU seeks for what it is given.

    A last axis of 1 or 64 does not stay last: [151936, 1] scales and [4096, 64] shards of a weight
    were seen with their long axis along the lanes.
    """
    if len(shape) < 2:
        lanes = 1024 if shape and shape[0] >= 1024 else LANES
        return tiled_bytes(shape, bits, [lanes])
    return min(
        tiled_bytes([*_without(shape, row, lane), shape[row], shape[lane]], bits,
                    [_rows(shape[row], bits), LANES])
        for row, lane in permutations(range(len(shape)), 2)
    )  # fmt: skip


def row_major_bytes(shape: Sequence[int], bits: int) -> int:
    """Bytes of an array whose axes lie in memory as they stand: the last along the lanes."""
    if len(shape) < 2:
        return padded_bytes(shape, bits)
    return tiled_bytes(shape, bits, [_rows(shape[-2], bits), LANES])


def _rows(size: int, bits: int) -> int:
    """Rows of a tile: 8, or 32 and 64 for types of 8 and 4 bits; fewer where there are fewer."""
    most = SUBLANES if bits >= 16 else SUBLANES * 32 // bits
    return max(32 // bits, min(most, 1 << (size - 1).bit_length()))


def _without(shape: Sequence[int], *axes: int) -> list[int]:
    return [size for axis, size in enumerate(shape) if axis not in axes]
