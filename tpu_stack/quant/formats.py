"""How a weight may be stored: one frozen `Format` per name, and nothing else decides by name.

A new format is a new entry here; the quantizer, the packer and the kernel read its fields.

>>> get_format("int4").bits_per_weight()
4.5
"""

import difflib
from dataclasses import dataclass
from math import lcm

import jax.numpy as jnp

from tpu_stack.errors import UserError

WORD_ROWS = 256
"""Rows of one-bit values that share eight rows of 32-bit words; a mesh must not cut them."""


@dataclass(frozen=True)
class Format:
    """How one weight tensor is stored: grid values times scales.

    Invariants: grid values lie in [low, high]; `group` is None when one scale spans the whole
    contraction axis (per output channel); an unquantized format has no scales. A grid value is the
    stored value plus `offset`, but for packed bits, where a set bit is +1 and a clear one -1.

    Attributes:
      name: the word used on the command line and in bundles.
      bits: bits per value in device memory and on disk, scales not counted.
      group: consecutive values along the contraction axis that share a scale, or None for all.
      storage: dtype name of the values; int32 holds 32 one-bit values (see `elements`).
      scale_dtype: dtype name of the scales, None when unquantized.
      low, high: the least and the greatest grid value; 0 and 0 when unquantized.
      offset: what to add to a stored integer for its grid value.
      scale_anchor: the grid value that the largest magnitude of a group maps to at full scale. A
        negative anchor means that scales carry a sign (see `quantize`).
      scale_search: the quantizer tries scales between these fractions of full scale, and 1.
      two_level: scales are further multiplied by one float32 scale for the whole matrix.
    """

    name: str
    bits: int
    group: int | None
    storage: str
    scale_dtype: str | None = None
    low: float = 0
    high: float = 0
    offset: float = 0.0
    scale_anchor: float = 0
    scale_search: tuple[float, float] = (1.0, 1.0)
    two_level: bool = False

    @property
    def quantized(self) -> bool:
        return self.scale_dtype is not None

    @property
    def kind(self) -> str:
        """What the values are: "integer", "float" or "bits"."""
        if self.storage == "int32":
            return "bits"
        return "float" if jnp.issubdtype(self.dtype, jnp.floating) else "integer"

    @property
    def has_zero(self) -> bool:
        """Whether zero is a grid value. Where it is not, a group of zeros has scale 0."""
        return self.kind != "bits" and self.offset == 0

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the values in device memory."""
        return jnp.dtype(self.storage)

    @property
    def operand(self) -> str:
        """dtype name that stands for the values in a product: int2 holds the +-1 of packed bits."""
        return "int2" if self.kind == "bits" else self.storage

    @property
    def granule(self) -> int | None:
        """Rows along the contraction axis that a mesh must not cut, None when any row will do."""
        return lcm(self.group or 1, WORD_ROWS) if self.kind == "bits" else self.group

    @property
    def scale_bits(self) -> int:
        return 8 * jnp.dtype(self.scale_dtype).itemsize if self.scale_dtype else 0

    def rows_stored(self, rows: int) -> int:
        """Rows of the values array that hold `rows` rows of the weight."""
        return 8 * -(-rows // WORD_ROWS) if self.kind == "bits" else rows

    def column_bytes(self, rows: int) -> int:
        """Packed bytes of one column of `rows` values: sub-byte values share bytes along K."""
        return 4 * self.rows_stored(rows) if self.kind == "bits" else -(-rows * self.bits // 8)

    def bits_per_weight(self, contract_size: int | None = None) -> float:
        """Bits per weight with its share of the scale.

        `contract_size` (K) is needed for per-channel formats, whose scale is shared by K values;
        without it their scales count as nothing. A second-level scale counts as nothing.
        """
        sharing = self.group or contract_size
        return self.bits + (self.scale_bits / sharing if sharing else 0.0)


def _by_group(name: str, *fields, **more) -> tuple[Format, ...]:
    """`name` in groups of 32, `name_g64` and `name_g128`, with bfloat16 scales."""
    bits, storage, *rest = fields
    return tuple(
        Format(f"{name}{suffix}", bits, group, storage, "bfloat16", *rest, **more)
        for suffix, group in (("", 32), ("_g64", 64), ("_g128", 128))
    )


# Scales. int4 in groups of 32 with bfloat16 scales is 4.5 bits a weight; float32 scales would be
# 5.0 for a gain of 0.001 dB, because the integers are chosen after the scale has been rounded.
# bfloat16 keeps float32's range, so no tensor-wide second scale is needed. A per-channel scale is
# shared by thousands of values, where float32 costs under 0.04 bits: those formats keep float32.
# MXFP4 is OCP Microscaling 1.0: its full scale, 2**floor(log2(largest)) / 4, is what `scale_anchor`
# 4 gives once rounded down to a power of two. NVFP4's e4m3 scales span 2**-9..448, so they need
# the second level. int2's grid is -1.5, -0.5, 0.5, 1.5: 1 dB better than -2..1.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float32", 32, None, "float32"),
        Format("bf16", 16, None, "bfloat16"),
        Format("int8", 8, None, "int8", "float32", -127, 127, 0, 127, (0.85, 1.0)),
        Format("fp8_e4m3", 8, None, "float8_e4m3fn", "float32", -448, 448, 0, 448, (0.7, 1.0)),
        Format("fp8_e5m2", 8, None, "float8_e5m2", "float32", -57344, 57344, 0, 57344, (0.7, 1.0)),
        *_by_group("int4", 4, "int4", -8, 7, 0, -8, (0.8, 1.14)),
        Format("int4_channel", 4, None, "int4", "float32", -8, 7, 0, -8, (0.5, 1.14)),
        Format("mxfp4", 4, 32, "float4_e2m1fn", "float8_e8m0fnu", -6, 6, 0, 4, (0.5, 2.0)),
        Format("nvfp4", 4, 16, "float4_e2m1fn", "float8_e4m3fn", -6, 6, 0, 6, (0.8, 1.6), True),
        *_by_group("int2", 2, "int2", -1.5, 1.5, 0.5, 1.5, (0.35, 1.0)),
        *_by_group("ternary", 2, "int2", -1, 1, 0, 1, (0.3, 1.0)),
        *_by_group("int1", 1, "int32", -1, 1, 0, 1, (0.2, 1.0)),
    )
}


def get_format(name: str) -> Format:
    """Returns the format called `name`. Raises UserError with the nearest name if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name).lower(), FORMATS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown weight format {name!r}; {hint}known formats: {', '.join(FORMATS)}")
