"""`tpu-stack plan simulate`: how long a step takes, term by term."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.units import bytes_text, seconds_text


@dataclass(frozen=True)
class Options:
    """Project a model's step time on a chip: training, or prefill and decode against batch.

    The simulator's constants are fitted to published results; `tpu-stack plan backtest` prints its
    errors. Nothing is compiled and nothing allocated.

    Example: tpu-stack plan simulate --model llama3_70b --profile v5p:4x8x8
    """

    model: str
    """Preset."""
    profile: str
    """Profile with a topology, such as v5p:4x8x8 or 8i:8; counts chips."""
    program: Literal["train", "serve"] | None = None
    """Training or serving; the default is serve on 8i and train on any other chip."""
    mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the nearest legal mesh."""
    batch_size: int | None = None
    """Training: sequences per step; the default makes about 8192 tokens a device."""
    seq_len: int = 4096
    """Training: tokens per sequence."""
    remat: Literal["none", "dots", "full"] | None = None
    """Training: what the backward pass recomputes; the default is the profile's."""
    accumulate: int = 1
    """Training: micro-batches per step."""
    format: str = "int4"
    """Serving: weight format."""
    context: int = 4096
    """Serving: positions in the cache of each sequence."""
    prompt: int = 1024
    """Serving: tokens of a prompt."""
    json: Path | None = None
    """Also write everything to this file."""


def run(options: Options) -> None:
    """Simulates and prints."""
    result = simulate(options)
    mesh = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    where = f"{options.model} under {result['profile']}, mesh {mesh}"
    if result["role"] == "train":
        _print_train(result, where)
    else:
        _print_serve(result, where, options)
    for note in result["notes"]:
        print(note)
    save_json(options.json, result)


def simulate(options: Options) -> dict[str, Any]:
    """The projection, JSON-ready; see `planner.projection.project`."""
    from tpu_stack.planner.projection import project

    asked = {field.name: getattr(options, field.name) for field in fields(options)}
    return project(**{name: value for name, value in asked.items() if name != "json"})


def _print_train(result: dict[str, Any], where: str) -> None:
    step = result["train_step"]
    rows = [
        [name, seconds_text(seconds), f"{seconds / step['step_s']:.1%}"]
        for name, seconds in sorted(step["terms_s"].items(), key=lambda item: -item[1])
        if seconds > 0
    ]
    rows.append(["step", seconds_text(step["step_s"]), "100.0%"])
    batch = f"{result['batch_size']} x {result['seq_len']} tokens"
    print_table(f"{where}, {batch} ({result['rung']})", ["term", "projected", "share"], rows)
    rate = f"{step['tokens_per_s_per_chip']:,.0f} tokens/s per chip"
    print(f"projected: {rate}, MFU {step['mfu']:.1%}{_economics(step)}")


def _print_serve(result: dict[str, Any], where: str, options: Options) -> None:
    rows = []
    for step in result["decode"]:
        largest = max(step["terms_s"], key=lambda name: step["terms_s"][name])
        cost = step["usd_per_million_tokens"]
        rows.append(
            [step["batch"], f"{1e3 * step['step_s']:.2f} ms", f"{step['tokens_per_s']:,.0f}",
             f"{step['tokens_per_s_per_chip']:,.0f}", largest,
             bytes_text(step["bytes_per_device"]), "yes" if step["fits"] else "NO",
             "-" if cost is None else f"${cost:.3f}"]
        )  # fmt: skip
    columns = ["batch", "ms per token", "tokens/s", "per chip", "largest term", "per device",
               "fits", "per million"]  # fmt: skip
    title = f"{where}, {options.format}, decode at {options.context} positions ({result['rung']})"
    print_table(title, columns, rows)
    prefill = result["prefill"]
    through = f"prefill of {prefill['prompt']} tokens takes"
    rate = f"{prefill['tokens_per_s_per_chip']:,.0f} tokens/s per chip"
    energy = _economics(result["decode"][0], cost=False)
    print(f"projected: {through} {seconds_text(prefill['seconds'])}, {rate}{energy}")


def _economics(step: dict[str, Any], *, cost: bool = True) -> str:
    text = ""
    if cost and step["usd_per_million_tokens"] is not None:
        text += f", ${step['usd_per_million_tokens']:.3f} per million tokens"
    if step["perf_per_watt_vs_7x"] is not None:
        text += f"; work per watt up to {step['perf_per_watt_vs_7x']:g} times 7x's (published)"
    return text
