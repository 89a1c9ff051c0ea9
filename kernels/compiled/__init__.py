"""Compile a kernel ahead of time, without a TPU, and read its static cost (rung 3, compiled).

A `bench.py` module has `program(case)`, which returns a function and its abstract arguments. A
child process compiles each case, because a bad kernel can abort the process. The figures are VLIW
bundles: of the whole code, with each loop body counted once, and, where the module knows the trip
counts, the bundles that one call issues. Nothing is run or timed.

    module = "tpu_stack.kernels.quantize_rows.bench"
    compile_case(module, "int8,bfloat16,16,4096", "v6e")  # {"bundles": ..., "kernels": ...}
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpu_stack.kernels.compiled.loops import DumpError, issued, libtpu_version

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
DEVICE_KIND = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


NO_ESTIMATE = 2**62
"""XLA's cost model writes cycles above this, near 2**63, for dtypes that it does not know, such as
float8 by bfloat16 on 7x (libtpu 0.0.52)."""


def estimated_cycles(text: str) -> int | None:
    """The sum of XLA's estimated cycles in a compiled program's text; None if any is missing."""
    cycles, unknown = estimates(text)
    return cycles if cycles and not unknown else None


def estimates(text: str) -> tuple[int, int]:
    """The sum of XLA's estimated cycles in a compiled program's text, and how many are missing."""
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    known = [count for count in cycles if count < NO_ESTIMATE]
    return sum(known), len(cycles) - len(known)


def compile_case(
    module: str, case: str, chip: str, trips: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compiles `program(case)` of `module` for `chip`, a key of `TOPOLOGY`.

    Args:
      trips: trip counts of the kernel's loops, as `loops.issued` takes them.

    Returns: {"bundles": of all kernels, "kernels": {name: bundles}, "xla_cycles": XLA's estimate
      of the rest, "unestimated": how many estimates are missing} and, given trips, "issued"; or
      {"error": one line}.

    Raises: DumpError when the compiler's dump is not as expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        result = _child(module, [case], chip, {"LIBTPU_INIT_ARGS": flags})[case]
        if isinstance(result, str):
            return {"error": result}
        kernels = read_bundles(Path(folder), result["kernels"])
        row: dict[str, Any] = {"bundles": sum(kernels.values()), "kernels": kernels}
        row |= {key: result[key] for key in ("xla_cycles", "unestimated")}
        if trips is not None:
            row["issued"] = sum(issued(Path(folder), name, trips) for name in kernels)
        return row


def refusals(module: str, cases: list[str], chip: str) -> dict[str, str]:
    """One line why, for each of the cases that does not compile for `chip`; in one child."""
    results = _child(module, cases, chip, {})
    return {case: result for case, result in results.items() if isinstance(result, str)}


def _child(module: str, cases: list[str], chip: str, env: dict[str, str]) -> dict[str, Any]:
    """The child's answer for each case; the reason of an abort stands for all cases."""
    command = [sys.executable, "-m", "tpu_stack.kernels.compiled", module, chip, *cases]
    env = os.environ | ENVIRONMENT | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return dict.fromkeys(cases, f"exit {done.returncode}: {last[:400]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_bundles(folder: Path, names: list[str]) -> dict[str, int]:
    """Static bundles of each kernel in `names` from the dump in `folder`.

    Raises: DumpError when a schedule is missing or not readable.
    """
    found = {}
    for name in names:
        files = list(folder.glob(f"*-{name}*schedule-analysis_final_bundles.txt"))
        text = files[0].read_text() if files else ""
        total = total_bundles(text)
        if total is None:
            count = len(list(folder.iterdir()))
            raise DumpError(f"no readable schedule of {name} among {count} dump files")
        found[name] = total
    return found


def total_bundles(analysis: str) -> int | None:
    """The bundles that the compiler's schedule analysis states, or None."""
    found = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
    return int(found[1]) if found else None


def bench_main(
    module: str,
    about: str | None,
    cases: list[str],
    form: str,
    trips: Callable[[str, str], Sequence[int]] | None = None,
    peers: dict[str, str] | None = None,
) -> None:
    """The command line of a bench module: prints a row per case and chip.

    Args:
      about: its docstring.
      cases: the default cases, written as `form` states.
      trips: (case, chip) -> trip counts of the kernel's loops.
      peers: case of a peer -> our case that computes the same.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--chips", nargs="+", choices=sorted(TOPOLOGY), default=list(TOPOLOGY))
    parser.add_argument("--cases", nargs="+", default=cases, help=form)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    print(f"libtpu {libtpu_version()}; rung 3 (compiled, not measured)")
    print(f"{'case':40} {'chip':5} {'bundles':>9} {'issued':>10} {'XLA cycles':>11}")
    rows = _rows(module, args.cases, args.chips, trips)
    _compare(rows, peers or {})
    print("GPU: nothing was measured")
    if args.json is not None:
        _save(args.json, {"libtpu": libtpu_version(), "rung": 3, "module": module, "rows": rows})


def _rows(
    module: str,
    cases: list[str],
    chips: list[str],
    trips: Callable[[str, str], Sequence[int]] | None,
) -> list[dict[str, Any]]:
    """One row per case and chip, printed as each is compiled."""
    rows = []
    for case in cases:
        for chip in chips:
            row = compile_case(module, case, chip, None if trips is None else trips(case, chip))
            rows.append({"case": case, "chip": chip, **row})
            told = f"{row.get('bundles')!s:>9} {row.get('issued', '-')!s:>10}"
            told += f" {row.get('xla_cycles') or '-'!s:>11}"
            print(f"{case:40} {chip:5} {row.get('error') or told}", flush=True)
    return rows


def _compare(rows: list[dict[str, Any]], peers: dict[str, str]) -> None:
    """Adds `ratio` to each peer's row, our cycles (bundles issued plus XLA's estimate) over its
    own, and prints it. A missing estimate counts as zero for a peer; ours then gets no ratio."""
    own = set(peers.values())
    cycles = {
        (row["chip"], row["case"]): row["issued"] + row["xla_cycles"]
        for row in rows
        if "issued" in row and not (row["unestimated"] and row["case"] in own)
    }
    for row in rows:
        ours, theirs = (row["chip"], peers.get(row["case"])), (row["chip"], row["case"])
        if ours in cycles and theirs in cycles:
            row["ratio"] = round(cycles[ours] / cycles[theirs], 3)
            slower = "  SLOWER" if row["ratio"] > 1 else ""
            print(f"{row['chip']:5} ours over {row['case']}: {row['ratio']:.2f} cycles{slower}")


def _save(path: Path, report: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report | {"gpu": "nothing was measured"}, indent=2) + "\n")
    partial.replace(path)
