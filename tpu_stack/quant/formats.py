"""How a weight may be stored: one frozen `Format` per name, and nothing else decides by name.

A new format is a new entry here; the quantizer, the packer and the kernel read its fields.

>>> get_format("int4").bits_per_weight()
4.5
"""

import difflib
from dataclasses import dataclass

import jax.numpy as jnp

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class Format:
    """How one weight tensor is stored.

    Invariants: `values` lie in [qmin, qmax]; `group` is None when one scale spans the whole
    contraction axis (per output channel); an unquantized format has no scales.

    Attributes:
      name: the word used on the command line and in bundles.
      bits: bits per value in device memory and on disk, scales not counted.
      group: consecutive values along the contraction axis that share a scale, or None for all.
      storage: dtype name of the values.
      scale_dtype: dtype name of the scales, None when unquantized.
      qmin, qmax: the integers a value may take; 0 and 0 when unquantized.
      scale_anchor: the integer that the largest magnitude of a group maps to at full scale. A
        negative anchor means that scales carry a sign (see `quantize`).
      scale_search: the quantizer tries scales between these fractions of full scale, and 1.
    """

    name: str
    bits: int
    group: int | None
    storage: str
    scale_dtype: str | None = None
    qmin: int = 0
    qmax: int = 0
    scale_anchor: int = 0
    scale_search: tuple[float, float] = (1.0, 1.0)

    @property
    def quantized(self) -> bool:
        return self.scale_dtype is not None

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the values in device memory."""
        return jnp.dtype(self.storage)

    @property
    def scale_bits(self) -> int:
        return 8 * jnp.dtype(self.scale_dtype).itemsize if self.scale_dtype else 0

    def bits_per_weight(self, contract_size: int | None = None) -> float:
        """Bits per weight with its share of the scale.

        `contract_size` (K) is needed for per-channel formats, whose scale is shared by K values;
        without it their scales count as nothing.
        """
        sharing = self.group or contract_size
        return self.bits + (self.scale_bits / sharing if sharing else 0.0)


# Scales. int4 in groups of 32 with bfloat16 scales is 4.5 bits a weight; float32 scales would be
# 5.0 for a gain of 0.001 dB, because the integers are chosen after the scale has been rounded.
# bfloat16 keeps float32's range, so no tensor-wide second scale is needed. A per-channel scale is
# shared by thousands of values, where float32 costs under 0.04 bits: int8 keeps float32.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float32", 32, None, "float32"),
        Format("bf16", 16, None, "bfloat16"),
        Format("int8", 8, None, "int8", "float32", -127, 127, 127, (0.85, 1.0)),
        Format("int4", 4, 32, "int4", "bfloat16", -8, 7, -8, (0.8, 1.14)),
    )
}


def get_format(name: str) -> Format:
    """Returns the format called `name`. Raises UserError with the nearest name if there is none."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name).lower(), FORMATS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown weight format {name!r}; {hint}known formats: {', '.join(FORMATS)}")
