"""What can come of compiling a program for a TPU: one type per outcome, each JSON-ready.

An abort, a refusal or too large a program is an answer, not a crash. JAX is
not imported here, so that an answer from the cache is quick.

    match result:
        case Compiled(): print(result.memory.total_bytes)
        case OutOfMemory(): print(result.used_bytes, "of", result.limit_bytes)
"""

import gzip
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tpu_stack.planner.aot.exposure import Exposure
from tpu_stack.planner.hlo_program import ProgramReport


@dataclass(frozen=True)
class Memory:
    """HBM of one JAX device as the compiler assigned it, in bytes.

    Attributes:
      arguments, outputs: of the program. aliased: of the outputs, what reuses donated arguments.
      temporaries: everything in between, at its highest. code: the program itself.
      peak: the most that is live at once by the compiler's own count, None where it does not say.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int | None = None

    @property
    def total_bytes(self) -> int:
        """What a device must have for the program to run."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class Allocation:
    """One of the largest allocations that the compiler lists when memory runs out, in bytes."""

    bytes: int
    shape: str
    operator: str
    kind: str


@dataclass(frozen=True)
class Target:
    """What was compiled for. Bytes are of one JAX device.

    Attributes:
      topology: the compiler's name of it. wrap: which of its axes close into rings.
      chip: whose compiler ran. profile_chip: the chip of the profile.
      devices: JAX devices. mesh: axis -> size.
      hbm_bytes: of the profile's chip. compiler_hbm_bytes: of the chip compiled for.
      matmul: which implementation of the quantized product is in the program, and why.
      clock_hz: cycles per second of the chip compiled for (`kernels.targets`), None if not known.
    """

    topology: str
    chip: str
    profile_chip: str
    devices: int
    mesh: dict[str, int]
    hbm_bytes: int
    compiler_hbm_bytes: int
    matmul: str
    wrap: tuple[bool, ...]
    clock_hz: float | None = None

    @property
    def links(self) -> str:
        """In words, how the slice wraps: "a torus", "axis 2 of 2 wraps" or "open"."""
        if all(self.wrap):
            return "a torus: every axis wraps"
        rings = [str(axis + 1) for axis, ring in enumerate(self.wrap) if ring]
        return f"axis {' and '.join(rings)} of {len(self.wrap)} wraps" if rings else "no axis wraps"

    @property
    def is_proxy(self) -> bool:
        """Whether the compiler does not know the profile's chip, and compiled for another."""
        return self.chip != self.profile_chip


@dataclass(frozen=True)
class Compiled:
    """The compiler made a program of it.

    Attributes:
      target, memory, report: what for, what it holds, what it does.
      exposures: one per collective of the report: its projected time and what hides it.
      hlo: file of the scheduled program's text, gzip-compressed; `hlo_text` reads it.
      matmul_flops: of one step over all devices, as traced.
      seconds: what the compile took, tracing included, when it was done. cached: no compile ran.
      compiler_bytes: the most memory that the compiler's process held.
      key: what made it this program and no other (`recompilation.key_of`).
    """

    target: Target
    memory: Memory
    report: ProgramReport
    exposures: tuple[Exposure, ...]
    hlo: Path
    matmul_flops: float
    seconds: float
    cached: bool
    compiler_bytes: int
    key: dict[str, Any] = field(default_factory=dict)

    def hlo_text(self) -> str:
        """The compiled program as XLA prints it."""
        return gzip.decompress(self.hlo.read_bytes()).decode()


@dataclass(frozen=True)
class OutOfMemory:
    """The program needs more HBM than a device has.

    Attributes:
      message: the compiler's, in one line.
      used_bytes, limit_bytes: of one device, None where it does not say. libtpu 0.0.52 gives up
        before it schedules, and counts temporaries only: `used_is_temporaries`.
      largest: the allocations it lists, largest first; none when it gives up early.
    """

    target: Target
    message: str
    used_bytes: int | None
    limit_bytes: int | None
    used_is_temporaries: bool
    largest: tuple[Allocation, ...]
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Refused:
    """The compiler or the lowering said no, for another reason than memory."""

    target: Target
    message: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Aborted:
    """The compiler's process ended without an answer."""

    target: Target
    message: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class TimedOut:
    """The compile was ended after `limit_s` seconds. Never cached."""

    target: Target
    limit_s: float


@dataclass(frozen=True)
class CompilerMissing:
    """No libtpu is installed: everything but rung 3 still works."""

    message: str = (
        "the TPU compiler (libtpu) is not installed: pip install 'tpu-stack[aot]' on Linux x86-64"
    )


Result = Compiled | OutOfMemory | Refused | Aborted | TimedOut | CompilerMissing

OUTCOMES: dict[type, str] = {
    Compiled: "compiled",
    OutOfMemory: "out of memory",
    Refused: "refused",
    Aborted: "aborted",
    TimedOut: "timed out",
    CompilerMissing: "compiler missing",
}


def as_json(result: Result) -> dict[str, Any]:
    """The result as JSON: `outcome` and the fields of its type; totals of memory included."""
    found: dict[str, Any] = {"outcome": OUTCOMES[type(result)], **asdict(result)}
    if isinstance(result, Compiled):
        found["hlo"] = str(result.hlo)
        found["memory"]["total_bytes"] = result.memory.total_bytes
        found["report"] = result.report.as_json()
        found["exposures"] = [
            {"own_s": e.own_s, "cover_s": e.cover_s, "exposed_s": e.exposed_s}
            for e in result.exposures
        ]
    if not isinstance(result, CompilerMissing):
        found["target"]["is_proxy"] = result.target.is_proxy
    return found
