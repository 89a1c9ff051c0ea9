"""One case of the bench: its name parsed, the program it compiles, and its roofline.

>>> hbm_cycles("int4@int8", "v6e", [16, 4096, 14336])
35805
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.quantized_matmul import make_plan, quantized_matmul
from tpu_stack.kernels.quantized_matmul.cases import (
    ACTIVATIONS,
    FORMATS,
    abstract_operands,
    stored_bytes,
)
from tpu_stack.kernels.quantized_matmul.operands import chip_info, cores_of
from tpu_stack.kernels.quantized_matmul.peers import BFLOAT16, PEERS, Peer, make_peer

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Peak bf16 FLOP/s over MXU size in jax's chip table; converts seconds to cycles only."""
KINDS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "7x": "TPU7x"}
"""The device kind of each chip."""


class Parts(NamedTuple):
    """The parts of a case's name; `peer` and `mode` are empty where it has none."""

    peer: str
    format: str
    activation: str
    mode: str


def parse(case: str) -> Parts:
    """The parts of "[PEER:]FORMAT[@ACTIVATION][:MODE]".

    Raises: ValueError for a peer, format or activation that does not exist.
    """
    peer, _, rest = case.rpartition(":") if case.split(":")[0] in PEERS else ("", "", case)
    name, _, mode = rest.partition(":")
    name, _, activation = name.partition("@")
    activation = activation or "bfloat16"
    if name not in FORMATS and not (peer and name == BFLOAT16):
        known = (*FORMATS, *((BFLOAT16,) if peer else ()))
        raise ValueError(f"case {case!r}: no format {name!r}; formats: {', '.join(known)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"case {case!r}: no activation {activation!r}: {', '.join(ACTIVATIONS)}")
    return Parts(peer, name, activation, mode)


def program(case: str, shape: list[int]) -> Peer:
    """The function of a case, its abstract operands and its grid steps."""
    parts = parse(case)
    if parts.peer:
        return make_peer(parts.peer, parts.format, parts.activation, tuple(shape))
    format = FORMATS[parts.format]
    operands = abstract_operands(format, parts.activation, *shape)
    options = {"offset": format.offset, "scale_mode": parts.mode or None}

    def function(x: Any, values: Any, scales: Any, keywords: dict[str, Any]) -> Any:
        return quantized_matmul(x, values, scales, interpret=False, **options, **keywords)

    *arrays, keywords = operands
    return Peer(function, operands, math.prod(make_plan(*arrays, **options, **keywords).grid))


def hbm_cycles(case: str, chip: str, shape: list[int]) -> int:
    """Cycles to move the operands and the result once at the chip's HBM bandwidth."""
    parts, (m, k, n) = parse(case), shape
    if parts.format == BFLOAT16:
        moved = 2.0 * (m * k + k * n)
    else:
        operands = abstract_operands(FORMATS[parts.format], parts.activation, *shape)
        moved = sum(stored_bytes(array) for array in jax.tree.leaves(operands))
    return round((moved + 2 * m * n) / bandwidth(chip) * CLOCK_HZ[chip])


def mxu_cycles(case: str, chip: str, shape: list[int], operands: Sequence[str]) -> int:
    """Cycles of the product at the chip's peak rate for `operands`.

    A peer's operands are unknown; the activation's dtype then gives the fastest possible rate.
    """
    activation = parse(case).activation
    types = set(operands or (activation,))
    info = _info(chip)
    fp8 = info.fp8_ops_per_second
    eight = {"int8": info.int8_ops_per_second, "float8_e4m3fn": fp8, "float8_e5m2": fp8}
    rates = [eight.get(name, 0) or info.bf16_ops_per_second for name in types]
    return round(2 * math.prod(shape) / (min(rates) * cores_of(KINDS[chip])) * CLOCK_HZ[chip])


def bandwidth(chip: str) -> float:
    """HBM bytes/s of one device, from jax's chip table."""
    return float(_info(chip).mem_bw_bytes_per_second) * cores_of(KINDS[chip])


def _info(chip: str) -> pltpu.TpuInfo:
    info = chip_info(KINDS[chip])
    assert info is not None, chip
    return info
