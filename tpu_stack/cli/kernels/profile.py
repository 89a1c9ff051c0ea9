"""`tpu-stack kernels profile`: a compiled kernel's bundles, unit by unit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.units import bytes_text


@dataclass(frozen=True)
class Options:
    """Read the compiler's static schedule of one kernel: bundles (VLIW instructions) inside and
    outside the grid loop, the occupancy of each unit, which unit binds, spills. Nothing is run.

    Example: tpu-stack kernels profile --format int4 --chip v6e --shape 16,4096,14336
    """

    format: str
    """Format of weights, pages or rows, such as int4."""
    op: str = "quantized_matmul"
    """quantized_matmul, grouped_matmul, kv_attention or quantize_rows."""
    activation: str = "bf16"
    """Type of x: bf16, fp8 or int8."""
    chip: str = "v6e"
    """v5e, v5p, v6e or 7x."""
    shape: str | None = None
    """Numbers with commas, such as M,K,N; the default is the op's, 16,4096,14336 for
    quantized_matmul."""
    cache: Path | None = None
    """Folder of compile results (default ~/.cache/tpu-stack/kernels)."""
    json: Path | None = None
    """Also write the profile to this file."""


def run(options: Options) -> int:
    """Prints two tables per kernel and the roofline; returns 1 when the compiler refuses it."""
    from tpu_stack.errors import UserError
    from tpu_stack.planner.kernels.case_registry import find_cases
    from tpu_stack.planner.kernels.cases import parse_shape
    from tpu_stack.planner.kernels.compile import Job, compile_case
    from tpu_stack.planner.kernels.profile import profile_schedule
    from tpu_stack.planner.kernels.targets import libtpu_version
    from tpu_stack.planner.kernels.verify import on_chip

    [case] = find_cases(options.op, options.format, options.activation)
    shape = case.check_shape(parse_shape(options.shape) if options.shape else case.large)
    with progress_of_one(f"{case.name} for {options.chip}"):
        compiled = compile_case(case, options.chip, shape, cache=options.cache)
    if compiled.not_run:
        raise UserError(f"profiling needs the TPU compiler: {compiled.not_run}")
    if compiled.error:
        print(f"{case.name} for {options.chip}: {compiled.error}")
        save_json(options.json, {"case": case.name, "error": compiled.error})
        return 1
    profiles = [profile_schedule(schedule) for schedule in compiled.schedules]
    whole = on_chip(Job(case, options.chip, shape), compiled)
    for found in profiles:
        _print(found, f"{case.name} for {options.chip}, {','.join(map(str, shape))}")
    print_table("\nbeside the chip's roofline", ["cycles", ""], _roofline(whole))
    save_json(
        options.json,
        {
            "case": case.name, "chip": options.chip, "shape": list(shape),
            "libtpu": libtpu_version(), "rung": 3, "xla_cycles": compiled.xla_cycles,
            "roofline": whole, "kernels": profiles,
        },
    )  # fmt: skip
    return 0


def progress_of_one(note: str) -> Any:
    """A progress bar for one compile."""
    from tpu_stack.cli.console import progress

    bar = progress()
    bar.add_task("compile", total=None, note=note)
    return bar


def _roofline(whole: dict[str, Any]) -> list[list[str]]:
    """Rows: the cycles of one call beside its roofline, if every DMA overlaps with compute."""
    return [
        ["HBM, each operand moved once", f"{whole['hbm_cycles']:,}"],
        ["MXU at this pair's peak", f"{whole['mxu_cycles']:,}" if whole["mxu_cycles"] else "-"],
        ["bundles issued, by all kernels", f"{whole['issued_bundles']:,}"],
        ["XLA's estimate around them", f"{whole['xla_cycles'] or 0:,}"],
        ["fraction of the roofline", f"{whole['fraction']:.2f}, bound by {whole['bound']}"],
    ]


def _print(found: dict[str, Any], title: str) -> None:
    from tpu_stack.planner.kernels.profile import UNITS
    from tpu_stack.planner.kernels.targets import libtpu_version

    inner = found["inner_loops"]
    rows = [
        ["kernel", found["kernel"]],
        ["compiled by", f"libtpu {libtpu_version()} (static, not measured)"],
        ["grid", " x ".join(f"{steps:g}" for steps in found["grid"])],
        ["bundles in the loop body", found["loop_bundles"]],
        ["bundles outside it", found["outside_bundles"]],
        ["bundles issued", found["issued_bundles"]],
        ["binding unit", f"{found['binding_unit']}, {found['binding_occupancy']:.0%} occupied"],
        ["spills, refills", f"{found['spills']}, {found['fills']}"],
        ["VMEM in use", bytes_text(found["vmem_bytes"])],
    ]
    if inner:
        rows.append(["inner loops", f"{inner}, each counted once: their trip counts are unknown"])
    print_table(title, ["profile", ""], rows)
    inside, outside = found["occupancy_loop"], found["occupancy_outside"]
    rows = [
        [unit, UNITS.get(unit, "unknown"), slots,
         f"{inside[unit]:.1%}" if inside else "-", f"{outside[unit]:.1%}" if outside else "-"]
        for unit, slots in found["capacity"].items()
    ]  # fmt: skip
    columns = ["unit", "meaning", "slots per bundle", "filled in the loop", "filled outside"]
    print_table("\noccupancy of each unit", columns, rows)
