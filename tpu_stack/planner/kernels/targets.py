"""The chips that a kernel is compiled or lowered for, and their HBM and MXU time in cycles.

Chip facts give these times in seconds; the compiler gives bundles, one a cycle. Everything is per
JAX device, as a compiled program is: half a chip on 7x, and on v5p both TensorCores, between which
the compiler splits a kernel's grid.

>>> compile_target("v6e").topology
'v6e:2x2'
"""

import difflib
import importlib.util
from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.hardware import get_chip
from tpu_stack.kernels.compiled import libtpu_version


@dataclass(frozen=True)
class CompileTarget:
    """A chip that the installed TPU compiler knows.

    Attributes:
      chip: its name in `CHIP_NAMES`.
      topology: the smallest topology name that `jax.experimental.topologies` takes for it.
      clock_hz: TensorCore cycles per second; no source found states it. For v5e and v5p it is the
        peak bf16 FLOP/s over the FLOPs per cycle of the MXUs in jax's chip table. For v6e and 7x it
        is half of that, an assumption that scales every cycle here: 3.5 and 4.4 GHz are no TPU's
        clock.
    """

    chip: str
    topology: str
    clock_hz: float

    @property
    def device_kind(self) -> str:
        return get_chip(self.chip).device_kinds[0]

    def hbm_cycles(self, nbytes: float) -> float:
        """Cycles that moving `nbytes` takes one device at its share of the HBM bandwidth."""
        chip = get_chip(self.chip)
        per_device = chip.require("hbm_bytes_per_s") / chip.devices(1)
        return nbytes / per_device * self.clock_hz

    def mxu_cycles(self, flops: float, operands: tuple[str, str]) -> float:
        """Cycles that `flops` take one device's matrix units at the pair's peak rate."""
        chip = get_chip(self.chip)
        rate = chip.peak_flops_per_s(*operands).flops_per_s_per_chip
        return flops / (rate / chip.devices(1)) * self.clock_hz

    @property
    def vmem_bytes(self) -> int:
        """VMEM of one TensorCore."""
        return get_chip(self.chip).vmem_bytes_per_core


COMPILE_TARGETS = {
    target.chip: target
    for target in (
        CompileTarget("v5e", "v5e:2x2", 1.5e9),
        CompileTarget("v5p", "v5p:2x2x1", 1.75e9),
        CompileTarget("v6e", "v6e:2x2", 1.75e9),
        CompileTarget("7x", "tpu7x:2x2x1", 2.2e9),
    )
}
"""libtpu 0.0.52 has no topology for TPU 8: 7x is the compiler's proxy for it."""

LOWER_TARGETS = {"8t": "TPU8t", "8i": "TPU8i", "7x": "TPU7x"}
"""Chip -> the device kind of the abstract device that the kernel is lowered for."""

CHIPS = (*COMPILE_TARGETS, *(name for name in LOWER_TARGETS if name not in COMPILE_TARGETS))


def known_chip(name: str) -> str:
    """`name`, if kernels are compiled or lowered for that chip; otherwise raises UserError."""
    if name in CHIPS:
        return name
    get_chip(name)  # raises for a name that is no chip
    raise UserError(f"kernels are not compiled or lowered for {name}; known: {', '.join(CHIPS)}")


def compile_target(name: str) -> CompileTarget:
    """The compile target called `name`. Raises UserError where libtpu cannot compile for it."""
    if name in COMPILE_TARGETS:
        return COMPILE_TARGETS[name]
    known_chip(name)
    raise UserError(
        f"libtpu {libtpu_version()} cannot compile for {name}; 7x is its proxy "
        f"(known: {', '.join(COMPILE_TARGETS)})"
    )


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def nearest(what: str, name: str, known: list[str]) -> UserError:
    """The error for an unknown `name` of a kind `what`, with the nearest one that is known."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}; {hint}known: {', '.join(known)}")
