"""`tpu-stack kernels explain`: which product runs for a format, chip and shape, and why."""

from dataclasses import dataclass
from pathlib import Path

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.units import seconds_text


@dataclass(frozen=True)
class Options:
    """Say which implementation, operand types and scale mode run x [M, K] @ W [K, N] on a chip,
    whether they are native or emulated, and why. Times are projected from chip facts.

    Example: tpu-stack kernels explain --format int4 --chip 8i --shape 16,4096,14336
    """

    format: str
    """Weight format, such as int4."""
    chip: str
    """v5e, v5p, v6e, 7x, 8t or 8i."""
    shape: str = "16,4096,14336"
    """M,K,N."""
    activation: str | None = None
    """Type of x: bf16, fp8 or int8; the default is the fastest, of equals the most exact."""
    json: Path | None = None
    """Also write the answer to this file."""


def run(options: Options) -> None:
    """Prints the choice, the reasons for it and the other candidates."""
    from tpu_stack.planner.kernels.cases import parse_shape
    from tpu_stack.planner.kernels.explain import explain

    found = explain(options.format, options.chip, parse_shape(options.shape), options.activation)
    plan = found.plan
    rows = [
        ["implementation", found.implementation],
        ["activations", f"{found.activation} ({found.chosen_by})"],
        ["matrix unit multiplies", " x ".join(found.computed_as)],
        ["scales", plan["scale_mode"]],
        ["blocks M, K, N", f"{plan['bm']}, {plan['bk']}, {plan['bn']} in grid {plan['grid']}"],
        ["accumulates in", plan["accumulator"]],
        *(
            ["because" if number == 0 else "", reason]
            for number, reason in enumerate(found.reasons)
        ),
    ]
    print_table(
        f"{options.format} on {options.chip}, M,K,N = {options.shape}", ["what", "choice"], rows
    )
    rows = []
    for c in found.candidates:
        if c.refused:
            rows.append([c.activation, " x ".join(c.operands), "-", "-", "-", "-", c.refused])
            continue
        rows.append(
            [c.activation, " x ".join(c.operands), " x ".join(c.computed_as),
             f"{c.peak_flops_per_s:.3g}", f"{c.ridge_rows:.0f}", seconds_text(c.time_s), c.support]
        )  # fmt: skip
    columns = ["activations", "operands", "multiplied as", "peak per chip", "ridge rows",
               "projected time at least", "support"]  # fmt: skip
    print_table("\ncandidates (projected from chip facts, not measured)", columns, rows)
    save_json(options.json, found.as_json())
