"""`tpu-stack plan compile`: a program as the real TPU compiler makes it, without a TPU (rung 3)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.plan.program_options import ProgramOptions
from tpu_stack.errors import UserError
from tpu_stack.units import bytes_text, seconds_text

TOP = 10


@dataclass(frozen=True)
class Options(ProgramOptions):
    """Compile the train step of a model, or the engine's prefill or decode, for a TPU slice with
    libtpu's compiler, without a TPU: its memory, its collectives and the tensors they are for, the
    cycles of its fusions. Results are cached on disk. Exit status 1: the compiler made no program.

    Profiles: v4, v5e, v5p, v6e, 7x with a topology; 8t and 8i through 7x as their proxy.

    Example: tpu-stack plan compile --model llama3_8b --profile v5p:4x4x4 --program train
    """

    cache: Path | None = None
    """Folder of cached results (default ~/.cache/tpu-stack/aot)."""
    json: Path | None = None
    """Also write the result to this file."""


def run(options: Options) -> int:
    """Compiles and prints the result; returns 0 when there is a program, else 1."""
    from tpu_stack.planner.aot.answer import compile_spec
    from tpu_stack.planner.aot.result import Compiled, CompilerMissing, as_json

    spec = options.spec()
    with _spinner() as stage:
        result = compile_spec(spec, cache=options.cache, timeout_s=options.timeout, stage=stage)
    save_json(options.json, {"spec": vars(spec), **as_json(result)})
    if isinstance(result, CompilerMissing):
        raise UserError(result.message)
    _print_target(options, result)
    if not isinstance(result, Compiled):
        print_failure(result)
        return 1
    print_compiled(result)
    return 0


@contextlib.contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Shows the compiler's stage and its time on standard error."""
    import sys

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("looking in the cache", total=None)
        yield lambda name: bar.update(task, description=name)


def _print_target(options: Options, result: Any) -> None:
    target = result.target
    proxy = f", as the proxy for {target.profile_chip}" if target.is_proxy else ""
    rows = [
        ["compiled for", f"{target.topology} ({target.devices} JAX devices){proxy}"],
        ["links", target.links],
        ["mesh", ",".join(f"{axis}={size}" for axis, size in target.mesh.items())],
    ]
    shapes = getattr(result, "key", {}).get("shapes", {})
    if shapes:
        sizes = (f"{name} {size}" for name, size in shapes.items() if size)
        rows.append(["sizes", ", ".join(sizes)])
    if options.program != "train":
        rows.append([f"{options.format} products", target.matmul])
    if hasattr(result, "seconds"):
        took = f"{result.seconds:.1f} s"
        rows.append(["took", f"{took} when it was compiled (cached)" if result.cached else took])
    if hasattr(result, "compiler_bytes"):
        rows.append(["compiler's memory", bytes_text(result.compiler_bytes)])
    print_table(f"{options.model}, {options.program}, {options.profile}", ["what", ""], rows)


def print_failure(result: Any) -> None:
    """Prints why there is no program."""
    from tpu_stack.planner.aot.result import OutOfMemory, TimedOut

    if isinstance(result, TimedOut):
        print(f"\nTIMED OUT after {result.limit_s:g} s; a larger --timeout gives it more time")
    elif isinstance(result, OutOfMemory):
        what = "temporaries alone" if result.used_is_temporaries else "used"
        print(
            f"\nOUT OF MEMORY: {what} {bytes_text(result.used_bytes)}"
            f" of {bytes_text(result.limit_bytes)} of HBM per device"
        )
        if result.target.is_proxy:
            own = bytes_text(result.target.hbm_bytes)
            print(
                f"that is the HBM of {result.target.chip}, the proxy;"
                f" {result.target.profile_chip} has {own} per device"
            )
        rows = [[bytes_text(a.bytes), a.shape, a.operator, a.kind] for a in result.largest[:TOP]]
        if rows:
            print_table("\nlargest allocations", ["bytes", "shape", "operation", "kind"], rows)
        print(f"the compiler: {result.message}")
    else:
        print(f"\nNO PROGRAM: {result.message}")


def print_compiled(result: Any) -> None:
    """Prints memory, collectives and operations of a `Compiled`."""
    _print_memory(result)
    _print_collectives(result)
    _print_costliest(result)
    _print_operations(result)
    print(
        "compiled (rung 3): memory, collectives and cycles are the compiler's, cycles by its own\n"
        "cost model; times are projected from chip facts (rung 4), nothing is measured."
    )


def _print_memory(result: Any) -> None:
    memory, target = result.memory, result.target
    reused = f"less {bytes_text(memory.aliased)} that reuses donated arguments"
    rows = [
        ["arguments", bytes_text(memory.arguments), ""],
        ["outputs", bytes_text(memory.outputs), reused],
        ["temporaries", bytes_text(memory.temporaries), ""],
        ["program", bytes_text(memory.code), ""],
        ["in all", bytes_text(memory.total_bytes),
         f"{memory.total_bytes / target.hbm_bytes:.1%} of {bytes_text(target.hbm_bytes)}"
         f" of {target.profile_chip}"],
    ]  # fmt: skip
    if memory.peak:
        rows.append(["peak", bytes_text(memory.peak), "live at once, by the compiler's count"])
    print_table("\nmemory per device", ["part", "bytes", ""], rows)


def _timed(result: Any) -> list[tuple[Any, Any]]:
    """(collective, exposure) in program order."""
    return list(zip(result.report.collectives, result.exposures, strict=True))


def _print_collectives(result: Any) -> None:
    from tpu_stack.planner.hlo_collective import summarize

    rows, summary = [], summarize(result.report.collectives)
    for row in summary:
        times = [time for c, time in _timed(result) if (c.kind, c.axes) == (row.kind, row.axes)]
        own, bare = sum(t.own_s for t in times), sum(t.exposed_s for t in times)
        unknown = f", {row.unknown_sites} in loops of unknown length" if row.unknown_sites else ""
        rows.append(
            [row.kind, row.axes_label, f"{row.count}{unknown}", bytes_text(row.bytes),
             bytes_text(row.wire_bytes), bytes_text(row.overlapped_bytes), seconds_text(own),
             seconds_text(bare)]
        )  # fmt: skip
    columns = ["collective", "mesh axes", "count", "bytes per device", "on the wire",
               "asynchronous", "projected time", "exposed"]  # fmt: skip
    print_table("\ncollectives, one step", columns, rows or [["none", *"-" * 7]])
    sent = sum(row.wire_bytes for row in summary)
    print(f"on the wire: {bytes_text(sent)} that each device sends, by ring algorithms")


def _print_costliest(result: Any) -> None:
    costliest = sorted(_timed(result), key=lambda pair: -pair[1].own_s)[:TOP]
    rows = [
        [c.purpose, c.kind, "unmatched" if c.axes is None else "+".join(c.axes) or "none",
         c.trips or "unknown", bytes_text(c.bytes), seconds_text(t.own_s),
         seconds_text(t.cover_s) if c.overlapped else "not asynchronous",
         seconds_text(t.exposed_s)]
        for c, t in costliest
    ]  # fmt: skip
    columns = ["purpose", "collective", "axes", "count", "bytes each", "projected time",
               "covered by", "exposed"]  # fmt: skip
    if rows:
        print_table(f"\nthe {len(rows)} costliest collectives", columns, rows)


def _print_operations(result: Any) -> None:
    report = result.report
    total = report.cycles or 1
    rows = [
        [op.source or op.name, op.op_name.rpartition("/")[2] or op.opcode,
         "no estimate" if op.cycles is None else f"{op.cycles:,}", op.trips or "unknown",
         f"{op.total_cycles / total:.1%}"]
        for op in report.operations[:TOP]
    ]  # fmt: skip
    kernels = f", {report.unestimated} without an estimate" if report.unestimated else ""
    print_table(
        f"\nthe costliest operations of {report.cycles:,} estimated cycles{kernels}",
        ["from", "operation", "cycles", "count", "share"],
        rows,
    )
