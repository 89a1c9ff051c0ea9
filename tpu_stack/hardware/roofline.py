"""The least time a program can take on a chip: arithmetic over chip facts, nothing else.

Every result is labelled rung 4, *projected*. All quantities are per chip; `Work.from_devices`
converts the compiler's, which are per JAX device (two to a chip on 7x and 8i).

>>> roofline(Work(flops_per_chip=2e12, hbm_bytes_per_chip=4e9), get_chip("8t")).bound
'compute'
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.matmul import MatmulRate

RUNG = 4
LABEL = "projected"

Bound = Literal["compute", "memory", "ici"]


@dataclass(frozen=True)
class Work:
    """What one chip does in one step: operations, HBM traffic, and bytes it sends over ICI.

    `operands` are the matmuls' (lhs, rhs) types; they choose the rate that all flops are charged
    at. Raises ValueError unless the three amounts are finite and at least 0.
    """

    flops_per_chip: float
    hbm_bytes_per_chip: float
    ici_bytes_per_chip: float = 0.0
    operands: tuple[Any, Any] = ("bfloat16", "bfloat16")

    def __post_init__(self):
        for amount in (self.flops_per_chip, self.hbm_bytes_per_chip, self.ici_bytes_per_chip):
            if not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"not an amount of work: {self}")

    @classmethod
    def from_devices(
        cls,
        chip: Chip,
        *,
        flops_per_device: float,
        hbm_bytes_per_device: float,
        ici_bytes_per_device: float = 0.0,
        operands: tuple[Any, Any] = ("bfloat16", "bfloat16"),
    ) -> "Work":
        """Per-device amounts times the devices of a chip.

        ICI bytes are an upper bound on a chip of two devices: what those two exchange stays on it.
        """
        n = chip.devices(1)
        return cls(
            n * flops_per_device, n * hbm_bytes_per_device, n * ici_bytes_per_device, operands
        )


@dataclass(frozen=True)
class Roofline:
    """A projected time and what bounds it.

    time_s = max(compute_s, hbm_s) + exposed_ici_s. `bound` names the largest of compute_s, hbm_s
    ("memory") and ici_s. Both intensities are flops per HBM byte; below the ridge, memory binds.
    """

    chip: str
    compute_s: float
    hbm_s: float
    ici_s: float
    exposed_ici_s: float
    time_s: float
    bound: Bound
    ridge_flops_per_byte: float
    intensity_flops_per_byte: float | None  # None: no HBM traffic
    rate: MatmulRate
    rung: int = RUNG
    label: str = LABEL

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, units in the keys, rung and label included."""
        return {**self.__dict__, "rate": self.rate.as_json()}


def roofline(
    work: Work, chip: Chip, *, ici_s: float | None = None, overlap: float = 0.0
) -> Roofline:
    """The least time `work` takes on `chip` (Williams et al. 2009, with ICI as a third roof).

    Args:
      ici_s: seconds of collectives, best taken from `collectives`. None: ici_bytes_per_chip over
        all of the chip's links one way, which is the least possible.
      overlap: the share of max(compute, HBM) time that collectives can hide under. 0 adds them in
        full (an upper bound), 1 hides all that fits (the lower bound, the maximum of the three).
    Raises UserError where the chip lacks a fact that this needs (its ICI bandwidth only when bytes
    move), ValueError for an overlap outside 0 to 1.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap is {overlap}; it must be from 0 to 1")
    rate = chip.peak_flops_per_s(*work.operands)
    hbm_bytes_per_s = chip.require("hbm_bytes_per_s")
    compute_s = work.flops_per_chip / rate.flops_per_s_per_chip
    hbm_s = work.hbm_bytes_per_chip / hbm_bytes_per_s
    if ici_s is None:
        moves = work.ici_bytes_per_chip > 0
        ici_s = work.ici_bytes_per_chip / chip.ici_bytes_per_s_one_way if moves else 0.0
    busy_s = max(compute_s, hbm_s)
    exposed_ici_s = max(0.0, ici_s - overlap * busy_s)
    roofs: dict[Bound, float] = {"compute": compute_s, "memory": hbm_s, "ici": ici_s}
    bytes_moved = work.hbm_bytes_per_chip
    return Roofline(
        chip=chip.name,
        compute_s=compute_s,
        hbm_s=hbm_s,
        ici_s=ici_s,
        exposed_ici_s=exposed_ici_s,
        time_s=busy_s + exposed_ici_s,
        bound=max(roofs, key=lambda name: roofs[name]),
        ridge_flops_per_byte=rate.flops_per_s_per_chip / hbm_bytes_per_s,
        intensity_flops_per_byte=work.flops_per_chip / bytes_moved if bytes_moved else None,
        rate=rate,
    )


def decode_ridge_batch(
    chip: Chip, weight_bits_per_parameter: float, lhs_dtype: Any, rhs_dtype: Any
) -> float:
    """The batch from which a decode step is bound by arithmetic rather than by reading weights.

    Each parameter is read once a step (weight_bits / 8 bytes) and multiplied and added once per
    sequence (2 flops). Cache traffic is left out, so the true ridge lies higher or is never
    reached. Projected, like everything here. Raises UserError for an unknown type or a chip
    without rates, ValueError unless the bits are positive.
    """
    if weight_bits_per_parameter <= 0:
        raise ValueError(f"weight_bits_per_parameter is {weight_bits_per_parameter}")
    ridge = chip.peak_flops_per_s(lhs_dtype, rhs_dtype).flops_per_s_per_chip / chip.require(
        "hbm_bytes_per_s"
    )
    return ridge * weight_bits_per_parameter / 8 / 2
