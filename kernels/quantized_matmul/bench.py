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
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.kernels.compiled import (
    ENVIRONMENT,
    TOPOLOGY,
    estimated_cycles,
    libtpu_version,
    read_bundles,
)
from tpu_stack.kernels.compiled.loops import issued
from tpu_stack.kernels.quantized_matmul import make_plan, quantized_matmul
from tpu_stack.kernels.quantized_matmul.cases import (
    ACTIVATIONS,
    FORMATS,
    abstract_operands,
    stored_bytes,
)
from tpu_stack.kernels.quantized_matmul.peers import BFLOAT16, PEERS, XLA_PEERS, Peer, make_peer

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Implied by peak bf16 FLOP/s over MXU size in jax's chip table; used only to state HBM cycles."""
VERSIONS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "7x": pltpu.ChipVersion.TPU_7X,
}
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


class Parts(NamedTuple):
    """What a case's name says; `peer` and `mode` are empty where it says nothing."""

    peer: str
    format: str
    activation: str
    mode: str


def parse(case: str) -> Parts:
    """The parts of "[PEER:]FORMAT[@ACTIVATION][:MODE]".

    Raises: ValueError for a peer, format or activation that does not exist.
    """
    peer, _, rest = case.rpartition(":") if case.split(":")[0] in PEERS else ("", "", case)
    name, _, mode = rest.partition(":")
    name, _, activation = name.partition("@")
    activation = activation or "bfloat16"
    if name not in FORMATS and not (peer and name == BFLOAT16):
        known = (*FORMATS, *((BFLOAT16,) if peer else ()))
        raise ValueError(f"case {case!r}: no format {name!r}; formats: {', '.join(known)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"case {case!r}: no activation {activation!r}: {', '.join(ACTIVATIONS)}")
    return Parts(peer, name, activation, mode)


def program(case: str, shape: list[int]) -> Peer:
    """The function that one case compiles, its abstract operands and the steps of its grid."""
    parts = parse(case)
    if parts.peer:
        return make_peer(parts.peer, parts.format, parts.activation, tuple(shape))
    format = FORMATS[parts.format]
    operands = abstract_operands(format, parts.activation, *shape)
    options = {"offset": format.offset, "scale_mode": parts.mode or None}

    def function(x: Any, values: Any, scales: Any, keywords: dict[str, Any]) -> Any:
        return quantized_matmul(x, values, scales, interpret=False, **options, **keywords)

    *arrays, keywords = operands
    return Peer(function, operands, math.prod(make_plan(*arrays, **options, **keywords).grid))


def compile_here(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in this process; `estimated_cycles` is None where XLA gives none.

    `kernels` names the Pallas kernels in it, and `steps` are those of their grid.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    mesh = Mesh(topology.devices[:1], ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        made = program(case, shape)
        operands = jax.tree.map(lambda a: _placed(a, whole), made.operands)
        text = jax.jit(made.function).lower(*operands).compile().as_text() or ""
        result: dict[str, Any] = {"estimated_cycles": estimated_cycles(text)}
        if made.steps is not None:
            calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
            result |= {"steps": made.steps, "kernels": calls}
        return result | ({} if parse(case).peer else _planned(case, operands))


def _placed(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The operand on the device. A factor per row, [M, 1], lies as the kernel that makes it leaves
    it, row by row: XLA would have a parameter of that shape come transposed, and copy it.
    """
    rows = array.ndim == 2 and array.shape[1] == 1
    place = Format(Layout((0, 1)), sharding) if rows else sharding
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


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


def hbm_cycles(case: str, chip: str, shape: list[int]) -> int:
    """Clock cycles that moving the operands and result once takes at the chip's HBM bandwidth."""
    parts, (m, k, n) = parse(case), shape
    if parts.format == BFLOAT16:
        moved = 2.0 * (m * k + k * n)
    else:
        operands = abstract_operands(FORMATS[parts.format], parts.activation, *shape)
        moved = sum(stored_bytes(array) for array in jax.tree.leaves(operands))
    return round((moved + 2 * m * n) / bandwidth(chip) * CLOCK_HZ[chip])


def mxu_cycles(case: str, chip: str, shape: list[int], operands: Sequence[str]) -> int:
    """Clock cycles of the product at the chip's peak rate for `operands`; a peer's are unknown, and
    then the rate is that of its rows' type, the fastest that it can have."""
    activation = parse(case).activation
    types = set(operands or (activation,))
    info = pltpu.get_tpu_info_for_chip(VERSIONS[chip], 1)
    fp8 = info.fp8_ops_per_second
    eight = {"int8": info.int8_ops_per_second, "float8_e4m3fn": fp8, "float8_e5m2": fp8}
    rates = [eight.get(name, 0) or info.bf16_ops_per_second for name in types]
    return round(2 * math.prod(shape) / min(rates) * CLOCK_HZ[chip])


def bandwidth(chip: str) -> float:
    """HBM bytes per second of one TensorCore, from jax's chip table."""
    return float(pltpu.get_tpu_info_for_chip(VERSIONS[chip], 1).mem_bw_bytes_per_second)


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
