"""Choosing tiles and scale mode without hardware: compile the candidates and count.

The cost of a call is the longer of its HBM cycles and the bundles it issues, plus the load of the
first block, which nothing overlaps with. Candidates whose double-buffered blocks would not fit VMEM
are not compiled. A real chip may order near ties otherwise: where it is at hand, `refine` measures.

>>> search(make_case("int4", "bf16"), "v6e", (16, 4096, 14336))[0].tiles
(16, 2048, 1024)
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from tpu_stack.errors import UserError
from tpu_stack.kernels.quantized_matmul import SCALE_MODES, Plan, make_plan
from tpu_stack.kernels.quantized_matmul.tiles import DECODE_M
from tpu_stack.planner.kernels import measure as measuring
from tpu_stack.planner.kernels.cases import Case, array_bytes
from tpu_stack.planner.kernels.compile import Compiled, Job, compile_jobs
from tpu_stack.planner.kernels.targets import CompileTarget, compile_target
from tpu_stack.quant import get_format

ROW_BLOCKS = {"decode": (64,), "prefill": (256, 512, 1024)}
DEPTHS = (512, 1024, 2048, 4096)
WIDTHS = (512, 1024, 2048)
VMEM_SHARE = 0.9
"""Of VMEM that a candidate's blocks may take; the compiler needs the rest."""


@dataclass(frozen=True)
class Candidate:
    """One setting of the kernel and what the compiler says it costs.

    Attributes:
      tiles: blocks of M, K and N, as the plan cut them to the shape.
      scale_mode: where scales are applied.
      cycles: the cost as the module states it; None when it did not compile.
      issued, loop, steps: bundles of the call, of the loop body, and grid steps.
      hbm_cycles, first_load: of the whole call, and of the first step's blocks.
      vmem_bytes: highest VMEM address in use.
      error: why it has no cost.
      current: whether this is what the kernel would choose now.
      seconds: wall clock of a call, measured; None where no such chip was at hand.
    """

    tiles: tuple[int, int, int]
    scale_mode: str
    cycles: int | None
    issued: int = 0
    loop: int = 0
    steps: int = 1
    hbm_cycles: int = 0
    first_load: int = 0
    vmem_bytes: int = 0
    error: str | None = None
    current: bool = False
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    tiles: tuple[int, int, int]
    scale_mode: str
    block_bytes: float
    call_bytes: float


def search(
    case: Case,
    chip: str,
    shape: tuple[int, ...],
    *,
    cache: Path | None = None,
    done: Callable[[str], None] = lambda note: None,
    limit: int | None = None,
) -> list[Candidate]:
    """Compiles the candidates, cheapest first; those that did not compile come last.

    Args:
      case: of quantized_matmul.
      limit: at most this many candidates, the current one among them.

    Raises: UserError where the compiler is absent or does not know the chip, or the op cannot be
      tuned.
    """
    target = compile_target(chip)
    found = settings(case, target, shape)[:limit]
    jobs = [
        Job(case, chip, shape, {"tiles": list(s.tiles), "scale_mode": s.scale_mode}) for s in found
    ]
    compiled = compile_jobs(
        jobs,
        cache=cache,
        done=lambda job: done(f"{job.options['tiles']} {job.options['scale_mode']}"),
    )
    if any(result.not_run for result in compiled):
        raise UserError(f"tuning needs the TPU compiler: {compiled[0].not_run}")
    candidates = [
        _candidate(target, setting, result, current=number == 0)
        for number, (setting, result) in enumerate(zip(found, compiled, strict=True))
    ]
    return sorted(candidates, key=lambda c: (c.cycles is None, c.cycles, math.prod(c.tiles)))


def refine(
    case: Case, chip: str, shape: tuple[int, ...], candidates: list[Candidate], top: int
) -> list[Candidate]:
    """On a host with that chip, the `top` cheapest (and the current one) by wall clock, then the
    rest as they were; elsewhere the candidates as they are."""
    if measuring.local_chip() != chip:
        return candidates
    chosen = [
        c
        for number, c in enumerate(candidates)
        if c.cycles is not None and (number < top or c.current)
    ]
    timed = []
    for c in chosen:
        seconds = measuring.measure(case, shape, tiles=c.tiles, scale_mode=c.scale_mode)
        timed.append(replace(c, seconds=seconds))
    rest = [c for c in candidates if c not in chosen]
    return sorted(timed, key=lambda c: c.seconds or 0.0) + rest


def beats(best: Candidate, current: Candidate) -> bool:
    """Whether `best` is worth keeping: less wall clock where both have it, else fewer cycles."""
    if best.seconds is not None and current.seconds is not None:
        return best.seconds < current.seconds
    return best.cycles is not None and (current.cycles is None or best.cycles < current.cycles)


def settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> list[_Setting]:
    """The distinct settings that the kernel takes and that fit VMEM; the current one first."""
    if "tiles" not in case.tunable:
        raise UserError(f"{case.op} has no tiles to tune; quantized_matmul has")
    kind, nbytes = target.device_kind, _Bytes.of(case, shape)
    current = plan_of(case, shape, kind)
    asked = [((current.bm, current.bk, current.bn), current.scale_mode)]
    asked += [
        ((bm, bk, bn), mode)
        for mode in SCALE_MODES
        for bm in ROW_BLOCKS[regime(shape[0])]
        for bk in DEPTHS
        for bn in WIDTHS
    ]
    found: dict[tuple, _Setting] = {}
    for tiles, mode in asked:
        try:
            plan = plan_of(case, shape, kind, tiles=tiles, scale_mode=mode)
        except ValueError:
            continue  # not a setting of the kernel at this shape
        cut = (plan.bm, plan.bk, plan.bn)
        step = nbytes.of_step(shape, cut)
        widened = 4 * plan.bk * plan.bn + 8 * plan.bm * plan.bn
        if (cut, mode) not in found and 2 * step + widened <= VMEM_SHARE * target.vmem_bytes:
            found[cut, mode] = _Setting(cut, mode, step, nbytes.of_call(shape, cut))
    return list(found.values())


def regime(m: int) -> str:
    """The regime of tiles.json that M rows belong to."""
    return "decode" if m <= DECODE_M else "prefill"


def plan_of(case: Case, shape: tuple[int, ...], kind: str, **options: Any) -> Plan:
    """The kernel's plan for the case at a shape on a device kind; options as in `make_plan`."""
    arrays = dict(case.abstract(shape))
    x, values, scales = (arrays.pop(name) for name in ("x", "values", "scales"))
    offset = get_format(case.format).offset
    return make_plan(x, values, scales, offset=offset, kind=kind, **arrays, **options)


@dataclass(frozen=True)
class _Bytes:
    """Packed bytes of the weight with its scales, of x and of the result, each once."""

    weight: int
    x: int
    out: int

    @classmethod
    def of(cls, case: Case, shape: tuple[int, ...]) -> "_Bytes":
        arrays = case.abstract(shape)
        weight = sum(array_bytes(arrays[name]) for name in ("values", "scales"))
        out = sum(map(array_bytes, jax.tree.leaves(case.out_shape(shape))))
        return cls(weight, array_bytes(arrays["x"]), out)

    def of_step(self, shape: tuple[int, ...], tiles: tuple[int, int, int]) -> float:
        """What one grid step loads and stores: each array's share of its axes."""
        m, k, n = (min(1.0, block / size) for block, size in zip(tiles, shape, strict=True))
        return self.weight * k * n + self.x * m * k + self.out * m * n

    def of_call(self, shape: tuple[int, ...], tiles: tuple[int, int, int]) -> float:
        """What a call moves: the weight once per block of M; x once per block of N, unless it is
        all one block and stays."""
        m, k, n = (math.ceil(size / block) for block, size in zip(tiles, shape, strict=True))
        return self.weight * m + self.x * (n if k > 1 else 1) + self.out


def _candidate(
    target: CompileTarget, setting: _Setting, result: Compiled, current: bool
) -> Candidate:
    if result.error:
        return Candidate(
            setting.tiles, setting.scale_mode, None, error=result.error, current=current
        )
    traffic = target.hbm_cycles(setting.call_bytes)
    first = target.hbm_cycles(setting.block_bytes)
    kernel = max(result.schedules, key=lambda schedule: schedule.executed)
    return Candidate(
        tiles=setting.tiles,
        scale_mode=setting.scale_mode,
        cycles=round(max(traffic, result.cycles) + first),
        issued=result.cycles,
        loop=kernel.loop.bundles,
        steps=kernel.steps,
        hbm_cycles=round(traffic),
        first_load=round(first),
        vmem_bytes=result.vmem_bytes,
        current=current,
    )
