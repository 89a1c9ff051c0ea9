"""`tpu-stack pack`: from a checkpoint to a frozen, packed, read-only bundle."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.sharding.placement import PlacementOptions
from tpu_stack.units import bytes_text


@dataclass(frozen=True)
class Options:
    """Freeze a checkpoint for serving: reshard to the serving layout, quantize, write a bundle.

    Example: tpu-stack pack runs/a --profile 8i --format int4 --out runs/a-int4
    """

    run: Positional[Path]
    """A run folder: the --out of `tpu-stack train` or `tpu-stack import`."""
    out: Path
    """Folder of the bundle; it must not exist yet."""
    format: str = "int4"
    """Weight format: bf16, int8, fp8_e4m3, int4, mxfp4, nvfp4, int2, ternary or int1, or another
    group size, such as int4_g64; the error for a wrong name lists all."""
    rotation: int = 0
    """Rotate 4-bit weights along the contracted axis by Hadamard blocks of this many rows (a power
    of two), which spreads outliers; 0 for none."""
    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips."""
    step: int | None = None
    """Step to pack; the default is the newest."""
    json: Path | None = None
    """Also write the result to this file."""
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Packs and prints what the bundle holds."""
    summary = pack_run(options)
    rows = [[name, kind, bytes_text(size)] for name, kind, size in summary["tensors"]]
    rows.append(["total", summary["format"], bytes_text(summary["bytes"])])
    print_table(f"bundle {options.out}", ["tensor", "stored as", "bytes"], rows)
    save_json(options.json, summary)


def pack_run(options: Options) -> dict[str, Any]:
    """Packs with a progress bar; returns what the bundle holds, JSON-ready."""
    from tpu_stack.api import packing

    with progress() as bar:
        task = bar.add_task("pack", total=None, note="")

        def listener(name: str, count: int) -> None:
            bar.update(task, advance=1, total=count, note=name)

        bundle = packing.pack(
            options.run,
            options.format,
            out=options.out,
            profile=options.profile,
            step=options.step,
            rotation=options.rotation,
            where=options.place,
            listener=listener,
        )
    manifest = bundle.manifest
    return {
        "bundle": str(options.out),
        "format": options.format,
        **{name: manifest.source[name] for name in ("step", "profile", "mesh")},
        "bytes": manifest.nbytes,
        "tensors": [
            [name, entry.format, sum(part.nbytes for part in entry.parts.values())]
            for name, entry in manifest.tensors.items()
        ],
    }
