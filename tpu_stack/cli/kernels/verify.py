"""`tpu-stack kernels verify`: every kernel interpreted, lowered and compiled (rungs 1 to 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, progress, save_json


@dataclass(frozen=True)
class Options:
    """Check kernels on rungs 1 to 3: interpreted against float64 with race and uninitialised-memory
    detection, lowered for 8t, 8i and 7x, compiled by libtpu for v5e, v5p, v6e and 7x beside the
    roofline. Exit status 1 when a rung fails. Compile results are cached.

    Example: tpu-stack kernels verify --format int4 --activation bf16 --chip v6e --json ladder.json
    """

    op: str | None = None
    """Kernel, such as quantized_matmul; the default is all."""
    format: str | None = None
    """Format of weights, pages or rows, such as int4; the default is all."""
    activation: str | None = None
    """Type of x: bf16, fp8 or int8; the default is all."""
    chip: str | None = None
    """Chip to lower or compile for; the default is all of the above."""
    shape: str | None = None
    """Numbers with commas, such as 16,4096,14336, to lower and compile instead of the case's own;
    also interpreted where it is small."""
    cache: Path | None = None
    """Folder of compile results (default ~/.cache/tpu-stack/kernels)."""
    write: bool = False
    """Also renew these cases' rows of the matrix in kernels/README.md; needs libtpu, and takes no
    --chip or --shape."""
    json: Path | None = None
    """Also write the results to this file."""


def run(options: Options) -> int:
    """Prints the ladder; returns 1 when a rung failed."""
    from tpu_stack.errors import UserError
    from tpu_stack.planner.kernels.case_registry import find_cases
    from tpu_stack.planner.kernels.cases import parse_shape
    from tpu_stack.planner.kernels.table import write_readme
    from tpu_stack.planner.kernels.targets import CHIPS, has_compiler, known_chip
    from tpu_stack.planner.kernels.verify import report, rungs, verify_cases

    if options.write and (options.chip or options.shape):
        raise UserError(
            "--write publishes every chip at the default shapes: drop --chip and --shape"
        )
    if options.write and not has_compiler():
        raise UserError("--write needs the TPU compiler; install the extra [aot] (libtpu)")
    chips = [known_chip(options.chip)] if options.chip else list(CHIPS)
    cases = find_cases(options.op, options.format, options.activation)
    shape = parse_shape(options.shape) if options.shape else None
    if shape:
        cases = [case for case in cases if case.check_shape(shape)]
    with progress() as bar:
        task = bar.add_task("verify", total=len(cases) * len(rungs(chips)), note="")
        results = verify_cases(
            cases,
            chips,
            shape=shape,
            cache=options.cache,
            done=lambda note: bar.update(task, advance=1, note=note),
        )
    print_ladder(results, chips)
    found = report(results)
    save_json(options.json, found)
    if options.write:
        write_readme(results)
    for line in found["failed"]:
        print(f"failed: {line}")
    return 1 if found["failed"] else 0


def print_ladder(results: list[dict[str, Any]], chips: list[str]) -> None:
    """Prints one table of rungs 1 and 2, and one of rung 3."""
    from tpu_stack.planner.kernels.targets import COMPILE_TARGETS, LOWER_TARGETS, libtpu_version

    lowered = [chip for chip in LOWER_TARGETS if chip in chips]
    rows = []
    for result in results:
        found = result["interpret"]
        error = f"{found['error']:.1e}" if "error" in found else found["failure"]
        cells = ["yes" if result["lowered"][chip]["ok"] else "no" for chip in lowered]
        at = ",".join(map(str, found["shape"]))
        rows.append([result["case"], at, error, f"{found['limit']:.0e}", *cells])
    columns = ["case", "interpreted at", "error against float64", "limit"]
    title = "rungs 1 and 2: interpreted without races or uninitialised reads, and lowered"
    print_table(title, [*columns, *(f"lowered {chip}" for chip in lowered)], rows)
    rows = [
        [result["case"], ",".join(map(str, result["shape"])), chip, *_compiled_cells(row)]
        for result in results
        for chip, row in result["compiled"].items()
    ]
    if any(chip in COMPILE_TARGETS for chip in chips):
        print_table(
            f"\nrung 3: compiled by libtpu {libtpu_version()}; cycles are static, not measured",
            ["case", "shape", "chip", "operands", "bundles", "steps", "issued", "XLA cycles",
             "HBM cycles", "HBM us", "MXU cycles", "bound", "of roofline", "VMEM"],
            rows,
        )  # fmt: skip


def _compiled_cells(row: dict[str, Any]) -> list[Any]:
    support = row.get("support") or "-"
    if row.get("not_run") or row.get("error"):
        return [support, *["-"] * 8, row.get("error") or f"not run: {row['not_run']}", "-"]
    return [
        support, row["bundles"], row["steps"], row["issued_bundles"], row["xla_cycles"] or "-",
        row["hbm_cycles"], f"{row['hbm_us']:.1f}", row["mxu_cycles"], row["bound"],
        f"{row['fraction']:.2f}", f"{row['vmem_share']:.1%}",
    ]  # fmt: skip
