"""Which rate a matrix product runs at on a chip, and whether the chip takes its operands as is.

The compiler casts operand types that the matrix unit does not have. So every rate says whether it
is *native*, by `TpuInfo.is_matmul_supported`, or *emulated*: the rate of the types that the
operands are cast to. Only exact casts are considered, so emulation costs speed and no accuracy.
float16 is the exception: its only exact cast is float32, which takes one bfloat16 pass.

>>> rate_of_matmul(get_chip("8i"), "bfloat16", "int4").support
'native'
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.hardware import jax_table

# Each operand type -> the types it casts to exactly, narrowest first.
EXACT_CASTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bfloat16": ("float32",),
    "float16": ("float32",),
    "float8_e4m3fn": ("bfloat16", "float32"),
    "float8_e5m2": ("bfloat16", "float32"),
    "float8_e4m3b11fnuz": ("bfloat16", "float32"),
    "float4_e2m1fn": ("float8_e4m3fn", "bfloat16", "float32"),
    "int8": ("bfloat16", "float32"),
    "uint8": ("bfloat16", "float32"),
    "int4": ("int8", "float8_e4m3fn", "bfloat16", "float32"),
    "uint4": ("int8", "float8_e4m3fn", "bfloat16", "float32"),
    "int2": ("int4", "int8", "float8_e4m3fn", "bfloat16", "float32"),
    "uint2": ("int4", "int8", "float8_e4m3fn", "bfloat16", "float32"),
}

_ALIASES = {
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp8": "float8_e4m3fn",
    "fp4": "float4_e2m1fn",
}

# Operand type -> the chip's fact with its rate. float32 runs through the bfloat16 unit.
_RATE_FACT = {
    "float32": "bf16_flops_per_s",
    "bfloat16": "bf16_flops_per_s",
    "float8_e4m3fn": "fp8_flops_per_s",
    "float8_e5m2": "fp8_flops_per_s",
    "float8_e4m3b11fnuz": "fp8_flops_per_s",
    "int8": "int8_ops_per_s",
    "uint8": "int8_ops_per_s",
    "int4": "int4_ops_per_s",
    "uint4": "int4_ops_per_s",
}


class RatedChip(Protocol):
    """What this module needs of a `chips.Chip`; a protocol, because `chips` imports this module."""

    @property
    def name(self) -> str: ...

    def require(self, name: str) -> int | float: ...


@dataclass(frozen=True)
class MatmulRate:
    """The peak rate of lhs x rhs on one chip, all of its TensorCores together.

    `computed_as` is the operand pair that reaches the matrix unit: the requested pair when
    `support` is "native", what it is cast to when "emulated". `rate_fact` names the chip's fact.
    """

    flops_per_s_per_chip: float
    support: Literal["native", "emulated"]
    computed_as: tuple[str, str]
    rate_fact: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, units in the keys."""
        return {
            "flops_per_s_per_chip": self.flops_per_s_per_chip,
            "support": self.support,
            "computed_as": list(self.computed_as),
            "rate_fact": self.rate_fact,
            "note": self.note,
        }


def dtype_name(dtype: Any) -> str:
    """The name of an operand type: a numpy or ml_dtypes type, its name, or bf16, f32, fp8, fp4.

    Raises UserError with the nearest name for anything that no chip here multiplies.
    """
    name = _ALIASES.get(dtype, dtype) if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in EXACT_CASTS:
        nearest = difflib.get_close_matches(name, [*EXACT_CASTS, *_ALIASES], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{name!r} is not a matmul operand type{hint} (one of {known_dtypes()})")
    return name


def known_dtypes() -> str:
    """The operand types by name, for messages."""
    return ", ".join(EXACT_CASTS)


def _native_rate(chip: RatedChip, pair: tuple[str, str]) -> tuple[float, str]:
    """(FLOP/s, name of the fact used) of a native pair: the slower of its operands' own rates.

    An operand type without a rate of its own (int4 on 8i, fp8 on v5e) runs at the other's; where
    neither has one, the pair runs at the bfloat16 rate.
    """
    rates = []
    for name in pair:
        fact = getattr(chip, _RATE_FACT[name])
        if fact is not None and fact.value:
            rates.append((fact.number, _RATE_FACT[name]))
    if not rates:
        rates.append((chip.require("bf16_flops_per_s"), "bf16_flops_per_s"))
    return min(rates)


def rate_of_matmul(chip: RatedChip, lhs_dtype: Any, rhs_dtype: Any) -> MatmulRate:
    """The peak FLOP/s of lhs x rhs on `chip`, native or through the fastest pair of exact casts.

    Equal rates go to the fewest casts, then to the narrowest types. A mixed native pair runs at the
    slower operand's rate (an assumption: jax's table has one rate per type). Raises UserError for
    an unknown type and for a chip without rates (cpu).
    """
    lhs, rhs = dtype_name(lhs_dtype), dtype_name(rhs_dtype)
    chip.require("bf16_flops_per_s")
    if jax_table.matmul_is_native(chip.name, lhs, rhs):
        pair, support = (lhs, rhs), "native"
    else:
        pair, support = _fastest_cast(chip, lhs, rhs), "emulated"
    rate, fact = _native_rate(chip, pair)
    notes = []
    if support == "emulated":
        notes.append(f"{lhs} x {rhs} is not native on {chip.name}: cast to {pair[0]} x {pair[1]}")
    if "float32" in pair:
        notes.append("float32 at default precision, one bfloat16 pass; higher takes several")
    return MatmulRate(rate, support, pair, fact, "; ".join(notes))


def _fastest_cast(chip: RatedChip, lhs: str, rhs: str) -> tuple[str, str]:
    pairs = [
        (lhs_cast, rhs_cast)
        for lhs_cast in (lhs, *EXACT_CASTS[lhs])
        for rhs_cast in (rhs, *EXACT_CASTS[rhs])
        if jax_table.matmul_is_native(chip.name, lhs_cast, rhs_cast)
    ]

    def preference(pair: tuple[str, str]) -> tuple[float, int]:
        return -_native_rate(chip, pair)[0], (pair[0] != lhs) + (pair[1] != rhs)

    return min(pairs, key=preference)  # float32 x float32 is native on every chip with a table
