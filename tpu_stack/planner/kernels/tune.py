"""Chooses tiles and scale mode without hardware: compiles the candidates and counts.

The cost of a call is the larger of its HBM cycles and the bundles it issues, plus the load of the
first block, which nothing overlaps with. Candidates whose double-buffered blocks would not fit VMEM
are not compiled. A real chip may order near ties otherwise: where there is one, `refine` measures.

    case = get_case("quantized_matmul", "int4", "bf16")
    search(case, "v6e", (16, 4096, 14336))[0].tiles  # (16, 2048, 1024)
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.planner.kernels import measure as measuring
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.compile import Compiled, Job, compile_jobs
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.settings import distinct_settings
from tpu_stack.planner.kernels.targets import CompileTarget, compile_target


@dataclass(frozen=True)
class Candidate:
    """One setting of the kernel and what the compiler says it costs.

    Attributes:
      tiles: blocks, as the plan cut them to the shape: of M, K and N; pages and key heads; rows.
      scale_mode: as in `Setting`.
      cycles: the cost as the module defines it; None when it did not compile.
      issued: bundles of the average call, with XLA's cycles around the kernels.
      loop, steps: bundles of the loop body, and grid steps, of the kernel that issues the most.
      hbm_cycles, first_load: cycles to move the whole call's bytes, and the first step's blocks.
      vmem_bytes: highest VMEM address in use.
      error: why it has no cost.
      current: whether this is what the kernel would choose now.
      seconds: measured wall-clock time of a call; None where there was no such chip.
    """

    tiles: tuple[int, ...]
    scale_mode: str | None
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
      case: of an op in `settings.FAMILIES`.
      done: called with the options of each candidate when its result is known.
      limit: at most this many candidates, the current one among them.

    Raises: UserError where the compiler is absent or does not know the chip, or the op cannot be
      tuned.
    """
    target = compile_target(chip)
    found = distinct_settings(case, target, shape)[:limit]
    jobs = [Job(case, chip, shape, setting.options) for setting in found]
    compiled = compile_jobs(
        jobs,
        cache=cache,
        done=lambda job: done(" ".join(str(value) for value in job.options.values())),
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
    """On a host with that chip, measures the `top` cheapest and the current one, and puts them
    first by measured time; elsewhere returns the candidates unchanged."""
    if measuring.local_chip() != chip:
        return candidates
    chosen = [
        c
        for number, c in enumerate(candidates)
        if c.cycles is not None and (number < top or c.current)
    ]
    timed = []
    for c in chosen:
        mode = {} if c.scale_mode is None else {"scale_mode": c.scale_mode}
        seconds = measuring.measure(case, shape, tiles=c.tiles, **mode)
        timed.append(replace(c, seconds=seconds))
    rest = [c for c in candidates if c not in chosen]
    return sorted(timed, key=lambda c: c.seconds or 0.0) + rest


def beats(best: Candidate, current: Candidate) -> bool:
    """Whether `best` takes less measured time than `current`; fewer cycles, where not measured."""
    if best.seconds is not None and current.seconds is not None:
        return best.seconds < current.seconds
    return best.cycles is not None and (current.cycles is None or best.cycles < current.cycles)


def _candidate(
    target: CompileTarget, setting: Setting, result: Compiled, current: bool
) -> Candidate:
    if result.error:
        return Candidate(
            setting.tiles, setting.scale_mode, None, error=result.error, current=current
        )
    traffic = target.hbm_cycles(setting.call_bytes)
    first = target.hbm_cycles(setting.block_bytes)
    issued = round(result.cycles * setting.step_share)
    kernel = max(result.schedules, key=lambda schedule: schedule.executed)
    return Candidate(
        tiles=setting.tiles,
        scale_mode=setting.scale_mode,
        cycles=round(max(traffic, issued) + first),
        issued=issued,
        loop=kernel.loop.bundles,
        steps=kernel.steps,
        hbm_cycles=round(traffic),
        first_load=round(first),
        vmem_bytes=result.vmem_bytes,
        current=current,
    )
