"""Compiles a kernel for a TPU that is not there and reads its static cost (rung 3, compiled).

A `bench.py` module offers `program(case)`, returning a function and its abstract arguments;
each is compiled in a child process, because a bad kernel can abort the process. The figure is the
VLIW bundles of the kernel's whole code, each loop body counted once; nothing is run or timed.

>>> compile_case("tpu_stack.kernels.kv_attention.bench", "int8", "v6e")  # {"bundles": 812, ...}
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

from tpu_stack.kernels.compiled.loops import DumpError, libtpu_version

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def compile_case(module: str, case: str, chip: str) -> dict[str, Any]:
    """Compiles `program(case)` of `module` for `chip`, a key of `TOPOLOGY`.

    Returns: {"bundles": of all kernels, "kernels": {name: bundles}}, or {"error": one line}.

    Raises: DumpError when the compiler's dump is not as expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        result = _child(module, [case], chip, {"LIBTPU_INIT_ARGS": flags})[case]
        if isinstance(result, str):
            return {"error": result}
        kernels = read_bundles(Path(folder), result)
        return {"bundles": sum(kernels.values()), "kernels": kernels}


def refusals(module: str, cases: list[str], chip: str) -> dict[str, str]:
    """The cases that do not compile for `chip`, with one line why; one child for all of them."""
    results = _child(module, cases, chip, {})
    return {case: result for case, result in results.items() if isinstance(result, str)}


def _child(module: str, cases: list[str], chip: str, env: dict[str, str]) -> dict[str, Any]:
    """By case the names of its kernels, or why there are none; an abort is the reason for all."""
    command = [sys.executable, "-m", "tpu_stack.kernels.compiled", module, chip, *cases]
    env = os.environ | ENVIRONMENT | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return dict.fromkeys(cases, f"exit {done.returncode}: {last[:400]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_bundles(folder: Path, names: list[str]) -> dict[str, int]:
    """Static bundles of each kernel in `names` from the dump in `folder`.

    Raises: DumpError when one is missing or not readable.
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
    """The total that the compiler's schedule analysis states; None when it states none."""
    found = re.search(r"total scheduled bundles:\s*(\d+)", analysis)
    return int(found[1]) if found else None


def bench_main(module: str, about: str | None, cases: list[str], form: str) -> None:
    """The command line of a bench module: `table` of the cases and chips that are asked for.

    Args:
      about: its docstring.
      cases: the ones by default, each of the form that `form` states.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--chips", nargs="+", choices=sorted(TOPOLOGY), default=list(TOPOLOGY))
    parser.add_argument("--cases", nargs="+", default=cases, help=form)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    table(module, args.cases, args.chips, args.json)


def table(module: str, cases: list[str], chips: list[str], json_file: Path | None) -> None:
    """Prints a row per case and chip, and writes them to `json_file` when there is one."""
    print(f"libtpu {libtpu_version()}; rung 3 (compiled, not measured); bundles, each loop once")
    rows = []
    for case in cases:
        for chip in chips:
            rows.append({"case": case, "chip": chip, **compile_case(module, case, chip)})
            told = rows[-1].get("error") or rows[-1]["bundles"]
            print(f"{case:32} {chip:5} {told}", flush=True)
    if json_file is not None:
        report = {"libtpu": libtpu_version(), "rung": 3, "module": module, "rows": rows}
        partial = json_file.with_name(json_file.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(json_file)
