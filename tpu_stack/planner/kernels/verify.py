"""Verifies cases rung by rung, and says which rungs failed.

Rung 1 interprets the kernel, with uninitialised memory as NaN and a race detector, in every program
that it becomes on these chips, and compares it with float64. Rung 2 lowers it for 8t, 8i and 7x.
Rung 3 compiles it for every chip that the installed compiler knows, and compares its bundles with
the chip's roofline.

    verify_cases([case], chips=("v6e", "8i"))[0]["compiled"]["v6e"]["fraction"]
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxpr_as_fun

from tpu_stack.hardware import get_chip
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.compile import (
    Compiled,
    Job,
    abstract_device,
    compile_jobs,
    lower_case,
    one_line,
)
from tpu_stack.planner.kernels.targets import (
    CHIPS,
    COMPILE_TARGETS,
    LOWER_TARGETS,
    libtpu_version,
)

SEED = 0
MAX_INTERPRETED = 2**20
"""The interpreter takes minutes for more elements than this; larger shapes are only compiled."""


def rungs(chips: Iterable[str] = CHIPS) -> list[tuple[str, str]]:
    """The rungs that `verify_cases` runs for these chips, as (rung, chip)."""
    chips = list(chips)
    return [
        ("interpret", "cpu"),
        *(("lowered", chip) for chip in LOWER_TARGETS if chip in chips),
        *(("compiled", chip) for chip in COMPILE_TARGETS if chip in chips),
    ]


def verify_cases(
    cases: Sequence[Case],
    chips: Iterable[str] = CHIPS,
    *,
    shape: tuple[int, ...] | None = None,
    cache: Path | None = None,
    done: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Runs rungs 1 to 3 on each case.

    Args:
      chips: of `CHIPS`.
      shape: compiled and lowered instead of `case.large`; interpreted too when it is small enough.
      cache: as in `compile_jobs`.
      done: called with a note after each of `rungs(chips)` of each case.

    Returns: per case, JSON-ready: its name and shapes, "interpret", "lowered" and "compiled" by
      chip, and "failed": a line for every rung that ran and failed.
    """
    chips = list(chips)
    results = []
    for case in cases:
        results.append(_first_rungs(case, chips, shape, done))
    jobs = [
        Job(case, chip, shape or case.large)
        for case in cases
        for rung, chip in rungs(chips)
        if rung == "compiled"
    ]
    found = compile_jobs(
        jobs, cache=cache, done=lambda job: done(f"{job.case.name}: compiled {job.chip}")
    )
    by_name = {result["case"]: result for result in results}
    for job, compiled in zip(jobs, found, strict=True):
        by_name[job.case.name]["compiled"][job.chip] = on_chip(job, compiled)
    return [result | {"failed": list(failures(result))} for result in results]


def _first_rungs(
    case: Case, chips: list[str], shape: tuple[int, ...] | None, done: Callable[[str], None]
) -> dict[str, Any]:
    large = shape or case.large
    result: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "format": case.format,
        "activation": case.activation,
        "axes": list(case.axes),
        "shape": list(large),
        "interpret": interpret(case, _interpreted_shapes(case, shape), kinds_of(chips)),
        "lowered": {},
        "compiled": {},
    }
    done(f"{case.name}: interpret")
    for rung, chip in rungs(chips):
        if rung == "lowered":
            error = lower_case(case, chip, large)
            result[rung][chip] = {"ok": error is None} | ({"error": error} if error else {})
            done(f"{case.name}: lowered {chip}")
    return result


def _interpreted_shapes(case: Case, shape: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    if shape is not None:
        elements = max(array.size for array in case.abstract(shape).values())
        if elements <= MAX_INTERPRETED:
            return [shape]
    return [case.small, *case.aligned]


def kinds_of(chips: Iterable[str]) -> list[str | None]:
    """The device kinds of the chips, by which kernels choose their plans; first None, the host."""
    kinds = [get_chip(chip).device_kinds for chip in chips]
    return [None, *(names[0] for names in kinds if names)]


def interpret(
    case: Case, shapes: Sequence[tuple[int, ...]], kinds: Sequence[str | None] = (None,)
) -> dict[str, Any]:
    """Rung 1: the kernel interpreted with race and uninitialised-memory detection, in numbers.

    Each shape runs as the program of each device kind; equal programs run once.

    Returns: "shape", the first; "programs", how many ran; "error", the largest relative Frobenius
      error against float64; "limit", "why" and "ok". Instead of programs and error, "failure": what
      the interpreter raised, in one line, such as a race or a read out of bounds.
    """
    found: dict[str, Any] = {
        "shape": list(shapes[0]), "limit": case.limit, "why": case.limit_reason
    }  # fmt: skip
    errors = []
    try:
        for shape in shapes:
            operands = case.operands(shape, SEED)
            want = case.reference(operands)
            errors += [relative_error(got, want) for got in _each_program(case, operands, kinds)]
    except Exception as error:  # whatever it raises is the finding
        return found | {"ok": False, "failure": one_line(error)}
    worst = max(errors)
    return found | {"programs": len(errors), "error": worst, "ok": bool(worst <= case.limit)}


def _each_program(case: Case, operands: Any, kinds: Sequence[str | None]) -> Iterator[np.ndarray]:
    """The result of each distinct program for these device kinds, as float64."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    leaves, seen = jax.tree.leaves(operands), set()
    for kind in kinds:
        with nullcontext() if kind is None else abstract_device(kind):
            traced = jax.jit(lambda a: case.call(a, interpret=params, exact=True)).trace(operands)
        # Equations name the mesh, and so the device kind, that they were traced under.
        lines = str(traced.jaxpr).splitlines()
        text = "\n".join(line for line in lines if "ctx_mesh=" not in line)
        if text not in seen:
            seen.add(text)
            (got,) = jax.jit(jaxpr_as_fun(traced.jaxpr))(*leaves)
            yield np.asarray(got).astype(np.float64)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||, Frobenius; infinite when any element of `got` is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    norm = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / (norm or 1.0)


def on_chip(job: Job, compiled: Compiled) -> dict[str, Any]:
    """A compile result beside the chip's roofline, JSON-ready.

    "fraction" is ideal / max(ideal, cycles). Cycles are the issued bundles plus XLA's estimate
    around them; ideal is the larger of HBM cycles (every operand and the result moved once) and MXU
    cycles at the operand pair's peak rate. So 1 means that the instructions add nothing. On 7x the
    compiler issues products to the matrix units at up to twice their published rate; the units, not
    the bundles, then bind. A projection from static counts: nothing is measured, and each DMA is
    taken to overlap with compute.
    """
    case, chip = job.case, job.chip
    if compiled.not_run:
        return {"ok": None, "not_run": compiled.not_run}
    if compiled.error:
        return {"ok": False, "error": compiled.error} | support(case, chip)
    target = COMPILE_TARGETS[chip]
    hbm = target.hbm_cycles(case.nbytes(job.shape))
    mxu = target.mxu_cycles(case.flops(job.shape), case.pair) if case.pair else 0.0
    ideal = max(hbm, mxu)
    return {
        "ok": True,
        "bundles": compiled.bundles,
        "steps": max((s.steps for s in compiled.schedules), default=1),
        "issued_bundles": sum(s.executed for s in compiled.schedules),
        "xla_cycles": compiled.xla_cycles,
        "hbm_cycles": round(hbm),
        "hbm_us": hbm / target.clock_hz * 1e6,
        "mxu_cycles": round(mxu),
        "bound": "bundles" if compiled.cycles > ideal else "HBM" if hbm >= mxu else "MXU",
        "fraction": ideal / max(ideal, compiled.cycles),
        "vmem_bytes": compiled.vmem_bytes,
        "vmem_share": compiled.vmem_bytes / target.vmem_bytes,
        "inner_loops": sum(s.inner_loops for s in compiled.schedules),
    } | support(case, chip)


def support(case: Case, chip: str) -> dict[str, Any]:
    """Whether the chip multiplies the case's operand types as they are, by its facts."""
    if case.pair is None:
        return {"support": None, "computed_as": None}
    rate = get_chip(chip).peak_flops_per_s(*case.pair)
    return {"support": rate.support, "computed_as": list(rate.computed_as)}


def failures(result: dict[str, Any]) -> Iterable[str]:
    """A line for every rung that ran and failed."""
    found = result["interpret"]
    if not found["ok"]:
        why = found.get("failure") or f"error {found['error']:.2e} is over {found['limit']:.0e}"
        yield f"{result['case']}: interpret: {why}"
    for rung in ("lowered", "compiled"):
        for chip, row in result[rung].items():
            if row["ok"] is False:
                yield f"{result['case']}: {rung} for {chip}: {row['error']}"


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results with the versions of libtpu and jax, JSON-ready."""
    return {
        "libtpu": libtpu_version(),
        "jax": jax.__version__,
        "rungs": "1 interpret, 2 lowered, 3 compiled; nothing was measured",
        "results": results,
        "failed": [line for result in results for line in result["failed"]],
    }
