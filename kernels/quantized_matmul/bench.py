"""What the TPU compiler says one weight block costs, without a TPU (rung 3, compiled).

Each case is compiled ahead of time in a subprocess, because a bad kernel can abort the process.
For the kernel the figure is the static VLIW bundles of the whole call; for XLA's own programs it
is the sum of XLA's estimated cycles. Neither is a measurement. 7x is also the proxy for TPU 8.

    python -m tpu_stack.kernels.quantized_matmul.bench --chips v6e 7x --json bench.json
"""

import argparse
import importlib.metadata
import json
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
from jax.sharding import SingleDeviceSharding

from tpu_stack.kernels.quantized_matmul import quantized_matmul

TOPOLOGY = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
CLOCK_HZ = {"v5e": 1.5e9, "v6e": 1.75e9, "7x": 2.2e9}
"""Implied by peak bf16 FLOP/s over MXU size in jax's chip table; used only to state HBM cycles."""
VERSIONS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "7x": pltpu.ChipVersion.TPU_7X,
}
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
KERNEL_CASES = ("int8", "int4", "int4:after_group")
PEER_CASES = ("xla:int8", "xla:int4", "xla:bf16")
GROUP = 32


def operands(case: str, m: int, k: int, n: int, sharding: Any) -> list[jax.ShapeDtypeStruct]:
    """Abstract x, values and scales of one case (x and the weight for "xla:bf16")."""
    name = case.split(":")[1] if case.startswith("xla:") else case.split(":")[0]

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = array((m, k), jnp.bfloat16)
    if name == "bf16":
        return [x, array((k, n), jnp.bfloat16)]
    if name == "int8":
        return [x, array((k, n), jnp.int8), array((1, 1, n), jnp.float32)]
    return [x, array((k, n), jnp.int4), array((k // GROUP, 1, n), jnp.bfloat16)]


def program(case: str) -> Any:
    """The function that one case compiles."""
    if case == "xla:bf16":
        return lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
    if case.startswith("xla:"):

        def dequantize_then_dot(x, values, scales):
            k, n = values.shape
            grouped = values.astype(x.dtype).reshape(scales.shape[0], -1, n)
            w = (grouped * scales.astype(x.dtype)).reshape(k, n)
            return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)

        return dequantize_then_dot
    _, _, mode = case.partition(":")
    return lambda x, v, s: quantized_matmul(x, v, s, scale_mode=mode or None, interpret=False)


def compile_here(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in this process; `estimated_cycles` is None where XLA gives none."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    m, k, n = shape
    args = operands(case, m, k, n, SingleDeviceSharding(topology.devices[0]))
    compiled = jax.jit(program(case)).lower(*args).compile()
    cycles = [int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text() or "")]
    return {"estimated_cycles": sum(cycles) if cycles else None}


def compile_in_subprocess(case: str, chip: str, shape: list[int]) -> dict[str, Any]:
    """Compiles one case in a child and reads its dumps; an abort is a result, not a crash.

    Returns: {"error": line} or {"estimated_cycles", "bundles"}; bundles only for the kernel, whose
      whole call is one program.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        env = os.environ | COMPILER_ENVIRONMENT | {"LIBTPU_INIT_ARGS": dump}
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
            result["bundles"] = read_bundles(Path(folder))
        return result


def read_bundles(folder: Path) -> int:
    """Static bundles of the kernel's call from the compiler's dump in `folder`.

    Raises: RuntimeError, naming the libtpu version, when the dump is not as expected.
    """
    files = list(folder.glob("*quantized_matmul*schedule-analysis_final_bundles.txt"))
    found = re.search(r"total scheduled bundles:\s*(\d+)", files[0].read_text()) if files else None
    if found is None:
        raise RuntimeError(
            f"libtpu {libtpu_version()} left no readable schedule analysis among "
            f"{len(list(folder.iterdir()))} dump files"
        )
    return int(found[1])


def libtpu_version() -> str:
    """The installed libtpu's version, or "not installed"."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hbm_cycles(case: str, chip: str, shape: list[int]) -> int:
    """Clock cycles that moving the operands and result once takes at the chip's HBM bandwidth."""
    m, k, n = shape
    bits = 0
    for array in operands(case, m, k, n, None):
        bits += array.size * (4 if array.dtype == jnp.int4 else 8 * array.dtype.itemsize)
    seconds = (bits / 8 + 2 * m * n) / bandwidth(chip)
    return round(seconds * CLOCK_HZ[chip])


def bandwidth(chip: str) -> float:
    """HBM bytes per second of one TensorCore, from jax's chip table."""
    return float(pltpu.get_tpu_info_for_chip(VERSIONS[chip], 1).mem_bw_bytes_per_second)


def run(chips: list[str], shape: list[int], cases: list[str]) -> list[dict[str, Any]]:
    """One row per chip and case."""
    rows = []
    for chip in chips:
        for case in cases:
            result = compile_in_subprocess(case, chip, shape)
            hbm = hbm_cycles(case, chip, shape)
            rows.append({"chip": chip, "case": case, "hbm_cycles": hbm, **result})
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['chip']:5} {row['case']:18} {row['error']}"
    bundles = row.get("bundles") or "-"
    cycles = row["estimated_cycles"] or "-"
    return f"{row['chip']:5} {row['case']:18} {bundles!s:>8} {cycles!s:>11} {row['hbm_cycles']:>8}"


def main() -> None:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(description="Static cost of one weight block, by compiler.")
    parser.add_argument("--chips", nargs="+", choices=sorted(TOPOLOGY), default=["v6e", "7x"])
    parser.add_argument("--shape", nargs=3, type=int, default=[16, 2048, 1024], help="M K N")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_here(**json.loads(args.child))))
        return
    print(f"M, K, N = {args.shape}; libtpu {libtpu_version()}; rung 3 (compiled, not measured)")
    print(f"{'chip':5} {'case':18} {'bundles':>8} {'XLA cycles':>11} {'HBM':>8}")
    rows = run(args.chips, args.shape, [*KERNEL_CASES, *PEER_CASES])
    if args.json:
        report = {"libtpu": libtpu_version(), "rung": 3, "shape_MKN": args.shape, "rows": rows}
        partial = args.json.with_name(args.json.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
