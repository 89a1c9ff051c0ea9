"""`tpu-stack kernels tune`: tiles and scale modes, searched by what the compiler makes of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.units import bytes_text, seconds_text


@dataclass(frozen=True)
class Options:
    """Search a kernel's tiles and scale modes for a chip that this machine need not have, by HBM
    cycles, issued bundles and VMEM; where the machine has it, the best are then measured. --write
    puts winners into the kernel's tiles.json.

    Example: tpu-stack kernels tune --chip v6e --format int4 --shape 16,4096,14336
    """

    chip: str
    """v5e, v5p, v6e or 7x."""
    op: str = "quantized_matmul"
    """quantized_matmul, grouped_matmul, kv_attention or quantize_rows."""
    format: str | None = None
    """Format of weights, pages or rows, such as int4; the default is every format."""
    activation: str = "bf16"
    """Type of x: bf16, fp8 or int8."""
    shape: str | None = None
    """M,K,N, where M (for grouped_matmul, M over the 8 experts) up to 64 tunes decode, above it
    prefill; B,S,N of kv_attention; M,K of quantize_rows. The default is kernels/README.md's."""
    limit: int | None = None
    """Compile at most this many candidates of each format."""
    top: int = 8
    """Candidates of each format to print, and to measure where this machine has the chip."""
    cache: Path | None = None
    """Folder of compile results (default ~/.cache/tpu-stack/kernels)."""
    write: bool = False
    """Write each winner that beats the current tiles to kernels/OP/tiles.json."""
    json: Path | None = None
    """Also write every candidate to this file."""


def run(options: Options) -> None:
    """Prints the candidates of each format, cheapest first."""
    from tpu_stack.errors import UserError
    from tpu_stack.planner.kernels import settings, tune, winners
    from tpu_stack.planner.kernels.case_registry import find_cases
    from tpu_stack.planner.kernels.cases import parse_shape
    from tpu_stack.planner.kernels.targets import compile_target, has_compiler, libtpu_version

    target = compile_target(options.chip)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; it must be at least 1")
    if not has_compiler():
        raise UserError("tuning needs the TPU compiler; install the extra [aot] (libtpu)")
    cases = find_cases(options.op, options.format, options.activation)
    shape = cases[0].large if options.shape is None else parse_shape(options.shape)
    counts = [
        len(settings.distinct_settings(case, target, case.check_shape(shape))[: options.limit])
        for case in cases
    ]
    found, won = [], []
    with progress() as bar:
        task = bar.add_task("tune", total=sum(counts), note="")
        for case in cases:
            candidates = tune.search(
                case, options.chip, shape, cache=options.cache, limit=options.limit,
                done=lambda note, name=case.name: bar.update(
                    task, advance=1, note=f"{name} {note}"
                ),
            )  # fmt: skip
            candidates = tune.refine(case, options.chip, shape, candidates, options.top)
            found.append((case, candidates))
    for case, candidates in found:
        _print(
            f"{case.name} for {options.chip}, {','.join(map(str, shape))}",
            f"blocks of {settings.family_of(options.op).BLOCK_AXES}",
            candidates,
            options.top,
        )
        best = candidates[0]
        if tune.beats(best, next(c for c in candidates if c.current)):
            won.append((case, options.chip, shape, best))
    if options.write and won:
        written = winners.write_winners(won)
        print(f"wrote to {settings.family_of(options.op).TILES_FILE}: {', '.join(written)}")
    save_json(
        options.json,
        {
            "op": options.op, "chip": options.chip, "shape": list(shape),
            "libtpu": libtpu_version(), "rung": 3,
            "formats": {c.name: [one.as_json() for one in cs] for c, cs in found},
        },
    )  # fmt: skip


def _print(title: str, blocks: str, candidates: list[Any], top: int) -> None:
    rows = []
    for number, c in enumerate(candidates):
        if number >= top and not c.current:
            continue
        tiles = ", ".join(map(str, c.tiles)) + (" (now)" if c.current else "")
        if c.cycles is None:
            rows.append([tiles, c.scale_mode or "-", *["-"] * 8, c.error])
            continue
        bound = "HBM" if c.issued <= c.hbm_cycles else "bundles"
        measured = "-" if c.seconds is None else seconds_text(c.seconds)
        rows.append(
            [tiles, c.scale_mode or "-", c.cycles, c.hbm_cycles, c.issued, c.loop, c.steps,
             c.first_load, bytes_text(c.vmem_bytes), measured, bound]
        )  # fmt: skip
    columns = [blocks, "scales", "cycles", "HBM cycles", "issued", "loop body", "steps",
               "first load", "VMEM", "measured", "bound"]  # fmt: skip
    print_table(f"{title}: {len(candidates)} candidates, by static cycles", columns, rows)
