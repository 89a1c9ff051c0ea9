"""What the TPU compiler says a call costs, without a TPU (rung 3, compiled).

Each case is compiled ahead of time in a subprocess, because a bad kernel can abort the process.
For the kernel the figure is the static VLIW bundles of the whole call, times the steps of its grid:
an upper bound, for what runs once is counted at every step. For XLA's own programs it is the sum of
XLA's estimated cycles. Neither is a measurement. 7x is also the proxy for TPU 8.

    python -m tpu_stack.kernels.quantized_matmul.bench --chips v6e 7x --json bench.json
    python -m tpu_stack.kernels.quantized_matmul.bench --cases mxfp4 int2@int8 xla:mxfp4
    python -m tpu_stack.kernels.quantized_matmul.bench --cases all --shape 16 4096 14336
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from tpu_stack.kernels.compiled import ENVIRONMENT, TOPOLOGY, libtpu_version, read_bundles
from tpu_stack.kernels.quantized_matmul import make_plan, quantized_matmul
from tpu_stack.kernels.quantized_matmul.cases import (
    ACTIVATIONS,
    FORMATS,
    abstract_operands,
    stored_bytes,
)

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Implied by peak bf16 FLOP/s over MXU size in jax's chip table; used only to state HBM cycles."""
VERSIONS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "7x": pltpu.ChipVersion.TPU_7X,
}
KERNEL = "quantized_matmul"
"""What the dump calls the kernel, in part."""
KERNEL_CASES = ("int8", "int4", "int4:after_group")
PEER_CASES = ("xla:int8", "xla:int4", "xla:bf16")
ALL_CASES = (
    *FORMATS,
    *(f"{name}@{x}" for x in ("float8_e4m3fn", "int8") for name in FORMATS),
    "xla:bf16",
    *(f"xla:{name}" for name in FORMATS),
)
"""Every format with bfloat16, float8 and int8 activations, and XLA's ways to do the same."""


def parse(case: str) -> tuple[str, str, str | None]:
    """(format, activation, scale mode) of "FORMAT[@ACTIVATION][:MODE]" or "xla:FORMAT".

    Raises: ValueError for a format or activation that does not exist.
    """
    name, _, mode = case.removeprefix("xla:").partition(":")
    name, _, activation = name.partition("@")
    activation = activation or "bfloat16"
    if name not in FORMATS and case != "xla:bf16":
        raise ValueError(f"case {case!r}: no format {name!r}; formats: {', '.join(FORMATS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"case {case!r}: no activation {activation!r}: {', '.join(ACTIVATIONS)}")
    return name, activation, mode or None


def operands(case: str, shape: list[int], sharding: Any = None) -> tuple[Any, ...]:
    """Abstract x, values, scales and keywords of one case; x and the weight for "xla:bf16"."""
    m, k, n = shape
    if case == "xla:bf16":
        return tuple(
            jax.ShapeDtypeStruct(of, jnp.bfloat16, sharding=sharding) for of in ((m, k), (k, n))
        )
    name, activation, _ = parse(case)
    return abstract_operands(FORMATS[name], activation, m, k, n, sharding)


def program(case: str) -> Any:
    """The function that one case compiles."""
    if case == "xla:bf16":
        return lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    name, _, mode = parse(case)
    offset = FORMATS[name].offset
    if case.startswith("xla:"):
        return lambda x, v, s, keywords: dequantize_then_dot(x, v, s, offset, **keywords)
    return lambda x, v, s, keywords: quantized_matmul(
        x, v, s, offset=offset, scale_mode=mode, interpret=False, **keywords
    )


def dequantize_then_dot(
    x: Any, values: Any, scales: Any, offset: float, tensor_scale: Any = None
) -> Any:
    """The peer: what XLA makes of widening the weight in bfloat16 before a plain product."""
    k, n = x.shape[1], values.shape[1]
    if values.dtype == jnp.int32:
        tiles = values.reshape(-1, 1, 8, n) >> jnp.arange(32).reshape(1, 32, 1, 1)
        values = (2 * (tiles & 1) - 1).reshape(-1, n)[:k]
    if tensor_scale is not None:
        scales = scales.astype(jnp.float32) * tensor_scale
    wide = values.astype(x.dtype) + jnp.asarray(offset, x.dtype)
    w = (wide.reshape(scales.shape[0], -1, n) * scales.astype(x.dtype)).reshape(k, n)
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def compile_here(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in this process; `estimated_cycles` is None where XLA gives none."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    device = topology.devices[0]
    args = operands(case, shape, SingleDeviceSharding(device))
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract)):
        compiled = jax.jit(program(case)).lower(*args).compile()
        cycles = [
            int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text() or "")
        ]
        result: dict[str, Any] = {"estimated_cycles": sum(cycles) if cycles else None}
        if not case.startswith("xla:"):
            result |= _planned(case, args)
    return result


def _planned(case: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """What the plan of a kernel's case says: steps of the grid, operands, mode and support."""
    name, _, mode = parse(case)
    x, values, scales, keywords = args
    plan = make_plan(x, values, scales, scale_mode=mode, offset=FORMATS[name].offset, **keywords)
    return {
        "steps": math.prod(plan.grid),
        "operands": list(plan.operands),
        "scale_mode": plan.scale_mode,
        "support": plan.support,
    }


def compile_in_subprocess(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in a child and reads its dumps; an abort is a result, not a crash.

    Returns: {"error": line} or {"estimated_cycles", "bundles"}; bundles only for the kernel, whose
      whole call is one program.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        env = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": dump}
        request = json.dumps({"case": case, "chip": chip, "shape": shape})
        command = [
            sys.executable,
            "-m",
            __spec__.name if __spec__ else __name__,
            "--child",
            request,
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            told = [line for line in lines if "Error: " in line] or lines
            return {"error": f"exit {done.returncode}: {told[-1][:300]}"}
        result = json.loads(done.stdout.strip().splitlines()[-1])
        if not case.startswith("xla:"):
            result["bundles"] = read_bundles(Path(folder), [KERNEL])[KERNEL]
        return result


def hbm_cycles(case: str, chip: str, shape: list[int]) -> int:
    """Clock cycles that moving the operands and result once takes at the chip's HBM bandwidth."""
    m, _, n = shape
    moved = 2 * m * n + sum(stored_bytes(array) for array in jax.tree.leaves(operands(case, shape)))
    return round(moved / bandwidth(chip) * CLOCK_HZ[chip])


def bandwidth(chip: str) -> float:
    """HBM bytes per second of one TensorCore, from jax's chip table."""
    return float(pltpu.get_tpu_info_for_chip(VERSIONS[chip], 1).mem_bw_bytes_per_second)


def run(chips: list[str], shape: list[int], cases: list[str]) -> list[dict[str, Any]]:
    """One row per chip and case; `fraction` is HBM cycles over the larger of them and bundles."""
    rows = []
    for chip in chips:
        for case in cases:
            result = compile_in_subprocess(case, chip, shape)
            hbm = hbm_cycles(case, chip, shape)
            row = {"chip": chip, "case": case, "hbm_cycles": hbm, **result}
            if "bundles" in row:
                row["fraction"] = round(hbm / max(hbm, row["bundles"] * row["steps"]), 3)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    start = f"{row['chip']:5} {row['case']:28}"
    if "error" in row:
        return f"{start} {row['error']}"
    shown = [row.get("bundles"), row.get("steps"), row["estimated_cycles"], row["hbm_cycles"]]
    columns = " ".join(f"{'-' if value is None else value!s:>10}" for value in shown)
    return f"{start} {columns} {row.get('fraction', '-')!s:>8}  {row.get('support', '')}".rstrip()


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description="Static cost of one call, by compiler.")
    parser.add_argument("--chips", nargs="+", choices=sorted(TOPOLOGY), default=["v6e", "7x"])
    parser.add_argument("--shape", nargs=3, type=int, default=[16, 2048, 1024], help="M K N")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[*KERNEL_CASES, *PEER_CASES],
        help="FORMAT[@ACTIVATION][:MODE], xla:FORMAT for XLA's own, or all",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_here(**json.loads(args.child))))
        return
    cases = list(ALL_CASES) if args.cases == ["all"] else args.cases
    try:
        for case in cases:
            parse(case)
    except ValueError as error:
        parser.error(str(error))
    print(f"M, K, N = {args.shape}; libtpu {libtpu_version()}; rung 3 (compiled, not measured)")
    heads = " ".join(f"{head:>10}" for head in ("bundles", "steps", "XLA cycles", "HBM"))
    print(f"{'chip':5} {'case':28} {heads} {'fraction':>8}")
    rows = run(args.chips, args.shape, cases)
    if args.json:
        report = {"libtpu": libtpu_version(), "rung": 3, "shape_MKN": args.shape, "rows": rows}
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
