"""What the TPU compiler says a call and its peers cost, without a TPU (rung 3, compiled).

Each case is compiled ahead of time in a subprocess, because a bad kernel can abort the process.
Cycles are, for a Pallas kernel, the longest of the HBM time of its operands, the MXU time at the
peak rate of what it multiplies, and the VLIW bundles that one call issues, plus XLA's estimate for
what it does around; for XLA's own programs the longest of HBM time, MXU time and XLA's estimate.
None of it is a measurement. 7x is also the proxy for TPU 8.

    python -m tpu_stack.kernels.quantized_matmul.bench --chips v6e 7x --json bench.json
    python -m tpu_stack.kernels.quantized_matmul.bench --cases mxfp4 int2@int8 xla:mxfp4
    python -m tpu_stack.kernels.quantized_matmul.bench --cases all --shape 16 2048 1024
    python -m tpu_stack.kernels.quantized_matmul.bench --cases int8@int8 --shape 2048 4096 14336
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.kernels.compiled import (
    ENVIRONMENT,
    TOPOLOGY,
    estimated_cycles,
    libtpu_version,
    read_bundles,
)
from tpu_stack.kernels.compiled.layouts import with_layout
from tpu_stack.kernels.compiled.loops import issued
from tpu_stack.kernels.quantized_matmul import make_plan
from tpu_stack.kernels.quantized_matmul.bench_case import hbm_cycles, mxu_cycles, parse, program
from tpu_stack.kernels.quantized_matmul.cases import FORMATS
from tpu_stack.kernels.quantized_matmul.peers import BFLOAT16, PEERS, XLA_PEERS

KERNEL_CASES = ("int8", "int4", "int4:after_group")
FAMILIES = ("int8", "fp8_e4m3", "int4", "int4_g128", "mxfp4", "nvfp4", "int2", "ternary", "int1")
"""A format of each kind, whose rows stand for the others."""
EIGHT_BITS = ("int8@int8", "fp8_e4m3@float8_e4m3fn")
"""Both operands in 8 bits, as served on v5e and v6e and on 7x."""
DEFAULT_CASES = (
    *(f"{peer}:{BFLOAT16}" for peer in ("xla", "jax")),
    *(f"{peer}{case}" for case in (*FAMILIES, *EIGHT_BITS) for peer in ("", "xla:", "qwix_dot:")),
    "qwix:int8@int8",
)
ALL_CASES = (
    *FORMATS,
    *(f"{name}@{x}" for x in ("float8_e4m3fn", "int8") for name in FORMATS),
    f"xla:{BFLOAT16}",
    *(f"xla:{name}" for name in FORMATS),
)
"""Every format with bfloat16, float8 and int8 activations, and XLA's ways to do the same."""


def compile_here(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in this process; `estimated_cycles` is None where XLA gives none.

    `kernels` names the Pallas kernels in it, and `steps` are those of their grid.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    mesh = Mesh(topology.devices[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        made = program(case, shape)
        operands = jax.tree.map(lambda a: with_layout(a, whole), made.operands)
        text = jax.jit(made.function).lower(*operands).compile().as_text() or ""
        result: dict[str, Any] = {"estimated_cycles": estimated_cycles(text)}
        if made.steps is not None:
            calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
            result |= {"steps": made.steps, "kernels": calls}
        return result | ({} if parse(case).peer else _planned(case, operands))


def _planned(case: str, operands: tuple[Any, ...]) -> dict[str, Any]:
    """What the plan of a kernel's case says of the product."""
    parts = parse(case)
    *arrays, keywords = operands
    offset = FORMATS[parts.format].offset
    plan = make_plan(*arrays, scale_mode=parts.mode or None, offset=offset, **keywords)
    return {
        "operands": list(plan.operands), "scale_mode": plan.scale_mode, "support": plan.support
    }  # fmt: skip


def compile_in_subprocess(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in a child and reads its dumps; an abort is a result, not a crash.

    Returns: {"error": line}, or `compile_here`'s and for Pallas kernels "bundles", each loop once,
      and "issued", loops multiplied out.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | ENVIRONMENT
        if parse(case).peer not in XLA_PEERS:
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            env |= {"LIBTPU_INIT_ARGS": dump}
        request = json.dumps({"case": case, "chip": chip, "shape": shape})
        module = __spec__.name if __spec__ else __name__
        command = [sys.executable, "-m", module, "--child", request]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            told = [line for line in lines if "Error: " in line] or lines
            return {"error": f"exit {done.returncode}: {told[-1][:300]}"}
        result = json.loads(done.stdout.strip().splitlines()[-1])
        kernels = result.pop("kernels", [])
        if kernels:
            read = read_bundles(Path(folder), kernels)
            result["bundles"] = sum(read.values())
            result["issued"] = sum(issued(Path(folder), k, (result["steps"],)) for k in kernels)
        return result


def run(chips: list[str], shape: list[int], cases: list[str]) -> list[dict[str, Any]]:
    """One row per chip and case, printed as they come.

    `fraction` of a kernel is the longer of HBM and MXU time over the longest of them and the
    bundles it issues.
    """
    rows = []
    for chip in chips:
        for case in cases:
            hbm = hbm_cycles(case, chip, shape)
            row = {"chip": chip, "case": case, "hbm_cycles": hbm}
            row |= compile_in_subprocess(case, chip, shape)
            mxu = mxu_cycles(case, chip, shape, row.get("operands", ()))
            roof = max(hbm, mxu)
            row["mxu_cycles"] = mxu
            if "issued" in row:
                row["fraction"] = round(roof / max(roof, row["issued"]), 3)
                row["cycles"] = max(roof, row["issued"]) + (row["estimated_cycles"] or 0)
            elif row.get("estimated_cycles"):
                row["cycles"] = max(roof, row["estimated_cycles"])
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    start = f"{row['chip']:5} {row['case']:31}"
    if "error" in row:
        return f"{start} {row['error']}"
    columns = ("bundles", "issued", "estimated_cycles", "hbm_cycles", "mxu_cycles", "cycles")
    cells = " ".join(f"{row.get(key) or '-'!s:>10}" for key in columns)
    return f"{start} {cells} {row.get('fraction', '-')!s:>8}  {row.get('support', '')}".rstrip()


def add_ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Gives each of our rows `ratios`: its cycles over each peer's of that chip and product.

    A peer's product is the format and activation; bfloat16 weights stand beside every format.
    Returns: the table of them, a line each; a ratio above 1 is a peer that is faster.
    """
    lines = []
    for row in rows:
        ours = parse(row["case"])
        if ours.peer or "cycles" not in row:
            continue
        row["ratios"] = {}
        for other in rows:
            peer = parse(other["case"])
            alike = peer.format == BFLOAT16 or peer[1:3] == ours[1:3]
            if other["chip"] == row["chip"] and peer.peer and alike and "cycles" in other:
                row["ratios"][other["case"]] = round(row["cycles"] / other["cycles"], 3)
        if row["ratios"]:
            told = "  ".join(f"{peer} {ratio:.2f}" for peer, ratio in row["ratios"].items())
            slower = "  SLOWER" if max(row["ratios"].values()) > 1 else ""
            lines.append(f"{row['chip']:5} {row['case']:31} {told}{slower}")
    return lines


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description="Static cost of one call, by compiler.")
    parser.add_argument(
        "--chips", nargs="+", choices=sorted(TOPOLOGY), default=["v5e", "v6e", "7x"]
    )
    parser.add_argument("--shape", nargs=3, type=int, default=[16, 4096, 14336], help="M K N")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=DEFAULT_CASES,
        help=f"[PEER:]FORMAT[@ACTIVATION][:MODE] of peers {', '.join(PEERS)}; or all",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_here(**json.loads(args.child))))
        return
    cases = list(ALL_CASES if args.cases == ["all"] else args.cases)
    try:
        for case in cases:
            parse(case)
    except ValueError as error:
        parser.error(str(error))
    print(f"M, K, N = {args.shape}; libtpu {libtpu_version()}; rung 3 (compiled, not measured)")
    columns = ("bundles", "issued", "XLA cycles", "HBM", "MXU", "cycles")
    heads = " ".join(f"{head:>10}" for head in columns)
    print(f"{'chip':5} {'case':31} {heads} {'fraction':>8}")
    rows = run(args.chips, args.shape, cases)
    ratios = add_ratios(rows)
    if ratios:
        print("\nours over each peer, in cycles of one call; below 1 ours is faster")
        print("\n".join(ratios))
    print("GPU: nothing was measured")
    if args.json:
        report = {"libtpu": libtpu_version(), "rung": 3, "shape_MKN": args.shape, "rows": rows}
        report["gpu"] = "nothing was measured"
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
