"""`tpu-stack plan search`: the best mesh, batch, format and remat for some chips and a goal."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.errors import UserError
from tpu_stack.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from tpu_stack.planner.search.candidate import Plan
    from tpu_stack.planner.search.confirm import Confirmation
    from tpu_stack.planner.search.find import Found

Row = list[str]


@dataclass(frozen=True)
class Options:
    """Try every legal mesh, batch, weight format (serving) and remat (training) of a model on some
    chips with the simulator; print the best and the Pareto front; compile the best few on request.
    Memory is predicted from shapes, time is the calibrated simulator's: projected. Cost is in USD
    per million tokens at the on-demand price of the chip facts; with --goal cost, slices of half, a
    quarter ... as many chips are tried too. Exit status 2: no plan is possible, and the error names
    the nearest.

    Models: nano, llama3_8b, llama3_70b, qwen3_0_6b, qwen3_8b, qwen3_32b, gemma3_1b, gemma3_27b.

    Example: tpu-stack plan search --model llama3_8b --chips v6e:8 --goal decode-throughput
    --latency-ms 20 --plot front.png
    """

    model: str = "llama3_8b"
    """Preset."""
    chips: tuple[str, ...] = ("v6e:64",)
    """NAME:COUNT or NAME:TOPOLOGY; several are searched together."""
    goal: Literal[
        "train-throughput", "prefill-throughput", "decode-throughput", "decode-latency", "cost"
    ] = "train-throughput"
    """What to optimize."""
    program: Literal["train", "prefill", "decode"] | None = None
    """The program that --goal cost is about (default decode)."""
    latency_ms: float | None = None
    """Longest allowed decode step, or prefill of a batch, in milliseconds."""
    seq_len: int | None = None
    """Tokens per training sequence (default 4096, at most the model's window)."""
    context: int | None = None
    """Positions that the cache holds per row, all of them read (default 4096, at most the model's
    window)."""
    prompt: int | None = None
    """Tokens of each row that prefill runs (default 1024, at most half the context)."""
    batch: tuple[int, ...] = ()
    """Sequences over all devices; the default tries many, in training up to 4M tokens a step."""
    format: tuple[str, ...] = ()
    """Weight formats (default bf16, int4, and int8 where the chip multiplies it, else fp8_e4m3)."""
    attention: Literal["flash", "plain"] = "flash"
    """Attention of a train step: flash, a kernel that writes no scores to memory, or plain, which
    writes them, as `tpu-stack train` does."""
    top: int = 8
    """Rows to print."""
    confirm: int = 0
    """Compile this many of the best with the TPU compiler."""
    timeout: float = 1800.0
    """Seconds after which a compile is ended."""
    cache: Path | None = None
    """Folder of compile results (default ~/.cache/tpu-stack/aot)."""
    plot: Path | None = None
    """Draw the Pareto front into this .png, .svg or .pdf."""
    json: Path | None = None
    """Also write counts, the best and the front to this file."""


def run(options: Options) -> None:
    """Prints the best plans and the front; writes the files asked for."""
    _check(options)
    from tpu_stack.planner.search import search
    from tpu_stack.planner.search.confirm import confirm
    from tpu_stack.planner.search.plot import check_path, write_plot

    if options.plot is not None:
        check_path(options.plot)
    ask = _ask(options)
    with _bar() as done:
        found = search(ask, done, show=max(options.top, options.confirm))
    confirmed: list[Confirmation] = []
    if options.confirm:
        with _spinner() as stage:
            confirmed = confirm(
                found.best[: options.confirm], options.model,
                cache=options.cache, timeout_s=options.timeout, stage=stage,
            )  # fmt: skip
    report = found.as_json(options.top)
    report["confirmed"] = [one.as_json() for one in confirmed]
    save_json(options.json, report)
    if options.plot is not None:
        write_plot(found, options.plot)
    _print(found, options, confirmed)


def _check(options: Options) -> None:
    for name, value, least in (("--top", options.top, 1), ("--confirm", options.confirm, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if not options.timeout > 0:
        raise UserError(f"--timeout is {options.timeout:g}; it must be more than 0 seconds")


def _ask(options: Options) -> Any:
    from tpu_stack.planner.search import Ask

    return Ask(
        options.model,
        options.chips,
        options.goal,
        program=options.program,
        latency_s=None if options.latency_ms is None else options.latency_ms / 1e3,
        seq_len=options.seq_len,
        context=options.context,
        prompt=options.prompt,
        batches=options.batch,
        formats=options.format,
        flash=options.attention == "flash",
    )


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    with progress() as bar:
        task = bar.add_task("search", total=None, note="")
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextlib.contextmanager
def _spinner() -> Iterator[Callable[["Plan", str], None]]:
    """Shows the plan that is compiled and its stage on standard error."""
    import sys

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("looking in the cache", total=None)
        yield lambda plan, name: bar.update(task, description=f"{plan.candidate.text}: {name}")


def _print(found: "Found", options: Options, confirmed: list["Confirmation"]) -> None:
    question, goal = found.question, found.question.goal
    title = f"{options.model}, {question.program}: best by {goal.first.name}, projected"
    head = _columns(question.program)
    print_table(title, head, [_cells(plan) for plan in found.best[: options.top]])
    front = found.front
    title = f"\nPareto front: {goal.first.name} against {goal.second.name}, projected"
    shown = front[: 2 * options.top]
    if len(front) > len(shown):
        title += f" (the first {len(shown)} of {len(front)}; --json has all)"
    print_table(title, head, [_cells(plan) for plan in shown])
    if confirmed:
        _print_confirmed(confirmed)
    _print_end(found)


def _print_confirmed(confirmed: list["Confirmation"]) -> None:
    rows = [
        [one.plan.candidate.text, one.verdict, bytes_text(one.used_bytes),
         bytes_text(one.plan.held_bytes), bytes_text(one.plan.capacity)]
        for one in confirmed
    ]  # fmt: skip
    columns = ["plan", "verdict", "compiler's memory", "predicted", "usable HBM"]
    print_table("\nthe best, by the TPU compiler (rung 3)", columns, rows)
    for reason in dict.fromkeys(one.reason for one in confirmed if one.reason):
        print(reason)


def _print_end(found: "Found") -> None:
    print(
        f"\n{found.candidates:,} candidates on {found.legal} legal of {found.meshes} meshes;"
        f" {found.fitting:,} fit and were simulated, in {found.seconds:.2f} s:"
        f" {found.rate:,.0f} candidates/s"
    )
    for note in found.notes:
        print(note)
    print(
        "times are projected (rung 4) by the calibrated simulator, memory is predicted from shapes;"
        " nothing is measured."
    )


def _columns(program: str) -> Row:
    speed = {"train": "trained", "prefill": "read", "decode": "decoded"}[program]
    step = {"train": "step", "prefill": "batch of prompts", "decode": "token"}[program]
    choice = "remat" if program == "train" else "format"
    return ["chips", "mesh", "batch", choice, f"tokens/s/chip {speed}", f"time of a {step}",
            "largest term", "memory per device", "headroom", "USD/M tokens"]  # fmt: skip


def _cells(plan: "Plan") -> Row:
    candidate, usd = plan.candidate, plan.usd_per_million_tokens
    term = plan.longest_term
    return [
        candidate.profile.name, candidate.mesh, f"{candidate.batch:,}",
        candidate.choice.removeprefix("remat "), f"{plan.tokens_per_s_per_chip:,.0f}",
        seconds_text(plan.step_s), f"{term} {plan.terms[term] / plan.step_s:.0%}",
        bytes_text(plan.held_bytes), f"{plan.headroom:.0%}", "-" if usd is None else f"{usd:.3g}",
    ]  # fmt: skip
