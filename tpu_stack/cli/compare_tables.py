"""The tables of `tpu-stack compare`; a module of their own because there are eight.

Example:
    print_comparison(compare(request))
"""

from collections.abc import Sequence
from typing import Any

from tpu_stack.cli.console import print_table
from tpu_stack.planner.report.words import move_text, spec_text
from tpu_stack.units import bytes_text, seconds_text


def print_comparison(result: dict[str, Any]) -> None:
    """Prints what `compare_profiles` returned."""
    _print_profiles(result)
    _print_tensors(result)
    _print_reshard(result)
    _print_memory(result)
    _print_programs(result)
    _print_two_by_two(result)
    _print_collectives(result)
    print(
        "\nprojected: computed from published chip facts, nothing measured; time is the least"
        " possible, everything overlapped.\n"
        f"reshard: {result['definitions']['reshard_bytes']}.\n"
        f"reshard plan: {result['definitions']['reshard']}."
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


def _tile_text(product: dict[str, Any] | None) -> str:
    """The kernel's tile for decode, bm x bk x bn."""
    if product is None or product["kernel"]["decode"]["tile"] is None:
        return "-"
    tile = product["kernel"]["decode"]["tile"]
    return f"{tile['bm']}x{tile['bk']}x{tile['bn']}"


def _print_tensors(result: dict[str, Any]) -> None:
    rows = []
    for row in result["tensors"]:
        train, serve, product = row["train"], row["serve"], row["serve"]["matmul"]
        axes = ", ".join(axis or "-" for axis in row["logical_axes"])
        rows.append(
            [row["name"], axes, spec_text(train["spec"], result["train"]["mesh"]),
             bytes_text(train["bytes_per_device"]), bytes_text(train["state_bytes_per_device"]),
             spec_text(serve["spec"], result["serve"]["mesh"]), serve["format"],
             product["support"] if product else "-", _tile_text(product),
             bytes_text(serve["bytes_per_device"]), bytes_text(row["reshard_bytes_per_device"]),
             bytes_text(row["reshard_bytes"])]
        )  # fmt: skip
    totals = result["totals"]
    rows.append(
        ["total", "", "", bytes_text(totals["train_bytes_per_device"]),
         bytes_text(totals["train_state_bytes_per_device"]), "",
         f"{totals['serve_bits_per_weight']:.2f} bits", "", "",
         bytes_text(totals["serve_bytes_per_device"]),
         bytes_text(totals["reshard_bytes_per_device"]), bytes_text(totals["reshard_bytes"])]
    )  # fmt: skip
    dtype = result["tensors"][0]["train"]["dtype"]
    print_table(
        f"\ntensors, bytes per device ({result['rungs']['tensors']})",
        ["tensor", "logical axes", "train spec", dtype, "with AdamW", "serve spec", "format",
         f"on {result['serve']['chip']}", "decode tile", "packed", "reshard", "reshard in total"],
        rows,
    )  # fmt: skip


def _print_reshard(result: dict[str, Any]) -> None:
    plan, mesh = result["reshard"], result["train"]["mesh"]
    rows = []
    for name, moves in plan["tensors"].items():
        for number, move in enumerate(moves):
            rows.append([name if number == 0 else "", *_move_cells(move, mesh)])
        if not moves:
            rows.append([name, "stays in place", "-", "-", "-"])
    for total in plan["totals"]:
        over = "+".join(total["axes"]) if total["axes"] else ""
        rows.append(
            ["total", f"{total['kind']} {over}".strip(), bytes_text(total["bytes_per_device"]),
             bytes_text(total["wire_bytes_per_device"]), seconds_text(total["seconds"])]
        )  # fmt: skip
    columns = ["reshard", "move", "payload per device", "moved per device", "projected time"]
    print_table(f"\nfrom training to serving layout ({result['rungs']['reshard']})", columns, rows)
    for chip in plan["network_figure_missing_for"]:
        print(
            f"no network rate is published for {chip}:"
            " the send is timed by the other side's rate alone"
        )


def _move_cells(move: dict[str, Any], mesh: dict[str, int]) -> list[str]:
    return [
        move_text(move, mesh),
        bytes_text(move["bytes"]),
        bytes_text(move["wire_bytes"]),
        seconds_text(move["seconds"]),
    ]


def print_why(found: dict[str, Any]) -> None:
    """Prints how both profiles map one tensor's logical axes to mesh axes."""
    rows = []
    for role in ("train", "serve"):
        for link in found[role]:
            sizes = [
                f"({axis}={size})" if axis in link["idle"] else f"{axis}={size}"
                for axis, size in link["mesh"].items()
            ]
            parts = f"{link['shards']} x {link['per_device']}" if link["shards"] > 1 else "whole"
            rows.append(
                [f"{role} {found['profiles'][role]}", link["dim"], link["size"],
                 link["logical_axis"] or "none", "+".join(link["rule"]) or "no rule",
                 ", ".join(sizes) or "-", link["granule"], parts]
            )  # fmt: skip
    print_table(
        f"why {found['tensor']} {found['shape']} is sharded so",
        ["side", "dimension", "size", "logical axis", "rule", "mesh axis", "kept together",
         "per device"],
        rows,
    )  # fmt: skip
    print("a mesh axis in brackets has size 1 and does not shard")


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


def _print_two_by_two(result: dict[str, Any]) -> None:
    rows = []
    for cell in result["two_by_two"]:
        own = "" if cell["own"] else " (other)"
        if "unavailable" in cell:
            rows.append([cell["program"], cell["chip"] + own, *["-"] * 7, cell["unavailable"]])
            continue
        parts = cell["breakdown"]
        split = ", ".join(
            f"{name} {seconds_text(parts[key])}" for name, key in BREAKDOWN if parts[key]
        )
        best = "does not fit" if cell["of_best"] is None else f"{cell['of_best']:.2f}"
        rows.append(
            [cell["program"], cell["chip"] + own, f"{cell['memory_share']:.1%}",
             seconds_text(cell["time_s"]), seconds_text(cell["time_no_overlap_s"]),
             f"{cell['tokens_per_s_per_chip']:,.0f}", best, cell["bound"],
             f"{cell['simulated']['tokens_per_s_per_chip']:,.0f}", split]
        )  # fmt: skip
    columns = ["2 x 2", "chip", "HBM", "projected time", "nothing overlapped", "tokens/s a chip",
               "of the best", "bound", "simulated", "time goes to"]  # fmt: skip
    print_table(f"\neach program on either chip ({result['rungs']['two_by_two']})", columns, rows)
    print(f"simulated tokens/s a chip: {result['rungs']['simulated']}")


BREAKDOWN: Sequence[tuple[str, str]] = (
    ("compute", "compute_s"), ("memory", "memory_s"), ("exposed collectives", "exposed_ici_s"),
)  # fmt: skip
"""The parts that add up to a projected time: (name, key of the breakdown)."""


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
