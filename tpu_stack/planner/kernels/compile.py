"""Compiles cases ahead of time for chips that this machine lacks, and lowers them for chips without
a public compiler. Results are cached on disk by content.

An abort, a refusal and a compile that takes too long are results, not exceptions.

    compile_case(get_case("quantized_matmul", "int4", "bf16"), "v6e").schedules[0].bundles
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from tpu_stack.files import write_json
from tpu_stack.kernels.compiled.layouts import is_row_factor
from tpu_stack.planner.kernels.bundles import Schedule
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.compiler_process import answers
from tpu_stack.planner.kernels.targets import (
    LOWER_TARGETS,
    compile_target,
    has_compiler,
    libtpu_version,
)

READER = 2
"""Part of the cache key: increment it when `Compiled` or what is read from the dumps changes."""
TIMEOUT_S = 300.0
_LOCATIONS = re.compile(r"\\22debug_locations\\22: \\22[^\\]*\\22")


@dataclass(frozen=True)
class Job:
    """One compile: a case for a chip at a shape, with the tuner's options of `case.call`."""

    case: Case
    chip: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """The result of one job. Exactly one of `schedules`, `error` and `not_run` is set.

    Attributes:
      schedules: one per Pallas kernel of the program.
      xla_cycles: XLA's estimate for its own fusions around the kernels; None where there are none,
        or one has no estimate.
      error: why the job did not compile, in one line.
      not_run: why it was not tried.
    """

    schedules: list[Schedule] = field(default_factory=list)
    xla_cycles: int | None = None
    error: str | None = None
    not_run: str | None = None

    @property
    def cycles(self) -> int:
        """Bundles issued in one call, plus XLA's estimated cycles around them as far as known."""
        return sum(schedule.executed for schedule in self.schedules) + (self.xla_cycles or 0)

    @property
    def bundles(self) -> int:
        """Static bundles of the kernels, each loop body once."""
        return sum(schedule.bundles for schedule in self.schedules)

    @property
    def vmem_bytes(self) -> int:
        return max((schedule.vmem_bytes for schedule in self.schedules), default=0)


def default_cache() -> Path:
    """The default folder of compile results: `tpu-stack/kernels` in $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tpu-stack" / "kernels"


def abstract_device(kind: str) -> AbstractContextManager[Any]:
    """A context in which kernels are planned and traced for a TPU of this device kind."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lower_text(case: Case, shape: tuple[int, ...], device_kind: str, **options: Any) -> str:
    """The StableHLO of a case, its kernel as Mosaic IR, for an abstract device (rung 2).

    Raises: whatever Pallas raises for a kernel that is not legal there.
    """
    with abstract_device(device_kind):
        traced = jax.jit(lambda a: case.call(a, interpret=False, **options)).trace(
            case.abstract(shape)
        )
        return traced.lower(lowering_platforms=("tpu",)).as_text()


def lower_case(case: Case, chip: str, shape: tuple[int, ...] | None = None) -> str | None:
    """Lowers a case for a chip of `LOWER_TARGETS`; None on success, else the reason in one line."""
    try:
        text = lower_text(case, shape or case.large, LOWER_TARGETS[chip])
    except Exception as error:  # any refusal is the result that the ladder reports
        return one_line(error)
    return None if "tpu_custom_call" in text else "lowered without a Pallas kernel"


def compile_case(
    case: Case,
    chip: str,
    shape: tuple[int, ...] | None = None,
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    **options: Any,
) -> Compiled:
    """`compile_jobs` for one case; its `large` shape when `shape` is None."""
    job = Job(case, chip, shape or case.large, options)
    return compile_jobs([job], cache=cache, timeout_s=timeout_s)[0]


def compile_jobs(
    jobs: Sequence[Job],
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    done: Callable[[Job], None] = lambda job: None,
) -> list[Compiled]:
    """Compiles each job for its chip and reads the schedules, or takes the result from the cache.

    Args:
      cache: folder of results; `default_cache()` when None.
      timeout_s: a compile that takes longer is ended, and its result says so.
      done: called with each job when its result is known.

    Returns: one result per job, in order.

    Raises: UserError for a chip that the compiler does not know.
    """
    results: dict[int, Compiled] = {}
    requests: list[dict[str, Any]] = []
    files: dict[int, Path] = {}
    for index, job in enumerate(jobs):
        device_kind = compile_target(job.chip).device_kind
        if not has_compiler():
            results[index] = Compiled(not_run="libtpu not installed")
        else:
            try:
                text = lower_text(job.case, job.shape, device_kind, **job.options)
            except Exception as error:  # refused before the compiler saw it
                results[index] = Compiled(error=f"not lowered: {one_line(error)}")
            else:
                files[index] = (cache or default_cache()) / f"{_key(text, job)}.json"
                kept = _read(files[index])
                if kept is None:
                    requests.append(_request(index, job))
                else:
                    results[index] = kept
        if index in results:
            done(job)
    for answer in answers(requests, timeout_s):
        result = Compiled(answer.schedules, answer.xla_cycles, answer.error)
        results[answer.index] = result
        if answer.lasting:
            write_json(files[answer.index], _as_json(result))
        done(jobs[answer.index])
    return [_with_steps(job, results[index]) for index, job in enumerate(jobs)]


def _with_steps(job: Job, compiled: Compiled) -> Compiled:
    """The result with the case's mean steps on the dynamic axis of the grid, if it has one."""
    steps = job.case.dynamic_steps
    if steps is None or all(schedule.bounded for schedule in compiled.schedules):
        return compiled
    count = steps(job.shape, compile_target(job.chip).device_kind, **job.options)
    return replace(compiled, schedules=[s.with_steps(count) for s in compiled.schedules])


def _request(index: int, job: Job) -> dict[str, Any]:
    return {
        "index": index,
        "op": job.case.op,
        "format": job.case.format,
        "activation": job.case.activation,
        "chip": job.chip,
        "shape": job.shape,
        "options": job.options,
    }


def one_line(error: Exception) -> str:
    """An exception as its type and the first 300 characters of its message."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}"


def _key(text: str, job: Job) -> str:
    """A hash of what decides a compile's result; the kernel's source lines are left out."""
    parts = [_LOCATIONS.sub("", text), job.chip, libtpu_version(), jax.__version__, str(READER)]
    if any(map(is_row_factor, job.case.abstract(job.shape).values())):
        parts.append("row factors lie row by row")  # which the text does not say
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _as_json(result: Compiled) -> dict[str, Any]:
    schedules = [schedule.as_json() for schedule in result.schedules]
    return {"schedules": schedules, "xla_cycles": result.xla_cycles, "error": result.error}


def _read(path: Path) -> Compiled | None:
    """A cached result; None where the file is missing or damaged."""
    try:
        data = json.loads(path.read_text())
        schedules = [Schedule.from_json(item) for item in data["schedules"]]
        return Compiled(schedules, data["xla_cycles"], data["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
