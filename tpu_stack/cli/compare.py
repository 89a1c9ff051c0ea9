"""`tpu-stack compare`: one model under a training and a serving profile, side by side."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.units import bytes_text, seconds_text


@dataclass(frozen=True)
class Options:
    """Lay a training and a serving profile side by side: tensors, resharding, and what each program
    costs. Nothing is allocated; speeds are projected. A profile is NAME:TOPOLOGY and counts chips.

    Models: nano, llama3_8b, llama3_70b, qwen3_0_6b, qwen3_8b, qwen3_32b, gemma3_1b, gemma3_27b.

    Example: tpu-stack compare --model llama3_8b --train 8t:4x4x4 --serve 8i:8 --json compare.json
    """

    model: str = "llama3_8b"
    """Preset to compare."""
    train: str = "8t:4x4x4"
    """Training profile."""
    serve: str = "8i:8"
    """Serving profile."""
    train_mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the nearest legal mesh to pure fsdp."""
    serve_mesh: str | None = None
    """Axis sizes, such as data=2,tensor=8; the default is the nearest legal mesh to pure tensor."""
    format: str = "int4"
    """What serving stores the weights as; any format of `tpu-stack pack`."""
    batch_size: int | None = None
    """Sequences per train step; the default makes about 8192 tokens a device."""
    seq_len: int | None = None
    """Tokens per training sequence (default 4096)."""
    serve_batch: int | None = None
    """Rows decoded together (default 16 per way of the data axis)."""
    context: int | None = None
    """Positions that the cache holds per row (default 4096)."""
    prompt: int | None = None
    """Tokens of each row that prefill runs (default 1024)."""
    json: Path | None = None
    """Also write the comparison to this file."""


def run(options: Options) -> None:
    """Prints the comparison."""
    result = compare_profiles(options)
    print_comparison(result)
    save_json(options.json, result)


def compare_profiles(options: Options) -> dict[str, Any]:
    """The comparison, JSON-ready. Raises UserError for anything that cannot be compared."""
    # XLA's partitioner warns of layouts it finds costly; the collectives below count that cost.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tpu_stack.planner import compare as planner

    _start_devices(planner.devices_wanted(options.train, options.serve))
    request = planner.make_request(
        options.model,
        options.train,
        options.serve,
        train_mesh=options.train_mesh,
        serve_mesh=options.serve_mesh,
        format=options.format,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        serve_batch=options.serve_batch,
        context=options.context,
        prompt=options.prompt,
    )
    with _bar(len(planner.STEPS) + len(planner.PROGRAMS)) as done:
        return planner.compare(request, done)


def _start_devices(count: int) -> None:
    """As many virtual CPU devices, unless JAX has started: then the planner makes do with those."""
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    with progress() as bar:
        task = bar.add_task("compare", total=total, note="")
        yield lambda name: bar.update(task, advance=1, note=name)


def print_comparison(result: dict[str, Any]) -> None:
    """Prints what `compare_profiles` returned."""
    _print_profiles(result)
    _print_tensors(result)
    _print_memory(result)
    _print_programs(result)
    _print_collectives(result)
    print(
        "projected: computed from published chip facts, nothing measured; time is the least"
        " possible, everything overlapped.\n"
        f"reshard: {result['definitions']['reshard_bytes']}."
    )
    for note in result["notes"]:
        print(f"note: {note}")


def _mesh_text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _print_profiles(result: dict[str, Any]) -> None:
    train, serve = result["train"], result["serve"]
    work = {
        "train": f"{train['batch_size']} sequences of {train['seq_len']}, remat {train['remat']}",
        "serve": f"{serve['batch']} rows, context {serve['context']}, prompt {serve['prompt']}",
    }
    stored = {
        "train": f"{train['precision']['params']}, computes in {train['precision']['compute']}",
        "serve": f"{serve['format']}, computes in {serve['precision']['compute']}",
    }
    rows = [
        [role, side["profile"], side["chips"], side["devices"], _mesh_text(side["mesh"]),
         side["mesh_by"], stored[role], work[role]]
        for role, side in (("train", train), ("serve", serve))
    ]  # fmt: skip
    print_table(
        f"{result['model']}, {result['parameters']:,} parameters",
        ["", "profile", "chips", "JAX devices", "mesh", "mesh chosen by", "weights", "work"],
        rows,
    )


def _spec_text(spec: list[Any], mesh: dict[str, int]) -> str:
    """Mesh axes per dimension; axes of size 1, which split nothing, in brackets."""

    def entry(names: Any) -> str:
        names = [names] if isinstance(names, str) else names or []
        return "+".join(n if mesh[n] > 1 else f"({n})" for n in names) or "-"

    return ", ".join(map(entry, spec))


def _print_tensors(result: dict[str, Any]) -> None:
    rows = []
    for row in result["tensors"]:
        train, serve, product = row["train"], row["serve"], row["serve"]["matmul"]
        axes = ", ".join(axis or "-" for axis in row["logical_axes"])
        rows.append(
            [row["name"], axes, _spec_text(train["spec"], result["train"]["mesh"]),
             bytes_text(train["bytes_per_device"]), bytes_text(train["state_bytes_per_device"]),
             _spec_text(serve["spec"], result["serve"]["mesh"]), serve["format"],
             product["support"] if product else "-", bytes_text(serve["bytes_per_device"]),
             bytes_text(row["reshard_bytes_per_device"]), bytes_text(row["reshard_bytes"])]
        )  # fmt: skip
    totals = result["totals"]
    rows.append(
        ["total", "", "", bytes_text(totals["train_bytes_per_device"]),
         bytes_text(totals["train_state_bytes_per_device"]), "",
         f"{totals['serve_bits_per_weight']:.2f} bits", "",
         bytes_text(totals["serve_bytes_per_device"]),
         bytes_text(totals["reshard_bytes_per_device"]), bytes_text(totals["reshard_bytes"])]
    )  # fmt: skip
    dtype = result["tensors"][0]["train"]["dtype"]
    print_table(
        f"\ntensors, bytes per device ({result['rungs']['tensors']})",
        ["tensor", "logical axes", "train spec", dtype, "with AdamW", "serve spec", "format",
         f"on {result['serve']['chip']}", "packed", "reshard", "reshard in all"],
        rows,
    )  # fmt: skip


def _print_memory(result: dict[str, Any]) -> None:
    rows = []
    for role, memory in result["memory"].items():
        terms = ", ".join(f"{k} {bytes_text(v)}" for k, v in memory["terms_per_chip"].items())
        fits = "fits" if memory["fits"] else "DOES NOT FIT"
        rows.append(
            [role, result[role]["chip"], bytes_text(memory["bytes_per_chip"]),
             bytes_text(memory["hbm_bytes_per_chip"]), f"{memory['share']:.1%}", fits, terms]
        )  # fmt: skip
    columns = ["memory per chip", "chip", "held", "HBM", "share", "", "of which"]
    print_table(f"\nmemory ({result['rungs']['memory']})", columns, rows)


def _print_programs(result: dict[str, Any]) -> None:
    rows = []
    for program in result["programs"]:
        for chip, found in program["roofline"].items():
            own = "" if chip == program["chip"] else " (other)"
            if "unavailable" in found:
                rows.append([program["name"], chip + own, *["-"] * 10, found["unavailable"]])
                continue
            bound = found["bound"] + (" hops" if found["bound_by_hops"] else "")
            rows.append(
                [program["name"], chip + own, found["chips"], f"{found['flops_per_chip']:.3g}",
                 f"{program['model_share_of_flops']:.0%}", bytes_text(found["hbm_bytes_per_chip"]),
                 seconds_text(found["compute_s"]), seconds_text(found["hbm_s"]),
                 seconds_text(found["ici_s"]), seconds_text(found["time_s"]), bound,
                 f"{found['tokens_per_s']:,.0f}",
                 f"{found['mfu']:.1%}" + ("" if found["memory"]["fits"] else ", does not fit")]
            )  # fmt: skip
    print_table(
        f"\nprograms, one step, per chip (time {result['rungs']['roofline']})",
        ["program", "chip", "chips", "FLOPs", "model share", "HBM bytes", "compute", "memory",
         "ici", "projected time", "bound", "tokens/s at most", "MFU at most"],
        rows,
    )  # fmt: skip


def _print_collectives(result: dict[str, Any]) -> None:
    rows = []
    for program in result["programs"]:
        for row in program["collectives"]:
            axes = "unmatched" if row["axes"] is None else "+".join(row["axes"]) or "none"
            times = [
                f"{chip} {seconds_text(s or 0)}" if s else f"{chip} 0"
                for chip, s in row["projected_s"].items()
            ]
            rows.append([program["name"], row["kind"], axes, row["count"],
                         bytes_text(row["bytes"]), ", ".join(times)])  # fmt: skip
        if not program["collectives"]:
            rows.append([program["name"], "none", "-", 0, "-", "-"])
    columns = ["program", "collective", "mesh axes", "count", "bytes per device", "projected time"]
    print_table(f"\ncollectives, one step ({result['rungs']['collectives']})", columns, rows)
