"""`make bench`: every benchmark in one run, with its peers beside it.

Hardware: any CPU; the kernel's bundles need libtpu (Linux x86-64). Cost: three quarters of an hour.
qwix is a peer where it is installed: `pip install qwix==0.1.8`.
PyTorch is a peer where an interpreter that has it is named: `TORCH_PYTHON=/path/to/python`.

    python experiments/bench_all.py --data tinyshakespeare.txt --out runs/bench
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).parent
MODULES = (
    "tpu_stack.kernels.quantized_matmul.bench",
    "tpu_stack.kernels.grouped_matmul.bench",
    "tpu_stack.kernels.kv_attention.bench",
    "tpu_stack.kernels.quantize_rows.bench",
    "tpu_stack.quant.bench",
)
"""Kernels by the TPU compiler's bundles; the quantized product on this CPU by wall clock."""

SERVED = (("float32", "float32", "float32"), ("int8", "bfloat16", "bfloat16"))
"""Weight format, what activations are computed in, and what the peer holds."""


@dataclass(frozen=True)
class Options:
    """Run the kernels' benchmarks and, given a text, training beside its PyTorch peer."""

    data: Path | None = None
    """tinyshakespeare.txt; without it the training benchmark is left out."""
    steps: int = 2000
    """Training steps of either side."""
    out: Path = Path("runs/bench")
    """Folder of the JSON results."""


def _run(name: str, command: list[str]) -> bool:
    print(f"== {name}", flush=True)
    done = subprocess.run(command, check=False).returncode == 0
    if not done:
        print(f"== {name} failed", file=sys.stderr)
    return done


def _serving(options: Options) -> bool:
    """The 0.6B shape with random weights, and `transformers` where PyTorch is named."""
    done, torch = True, os.environ.get("TORCH_PYTHON")
    for format, dtype, peer in SERVED:
        json_file = str(options.out / f"serve_{format}.json")
        command = [sys.executable, "-m", "tpu_stack.cli.main", "serve", "bench"]
        command += ["--model", "qwen3_0_6b", "--max-length", "256", "--requests", "8"]
        command += ["--repeats", "3", "--format", format, "--dtype", dtype, "--json", json_file]
        if torch is not None:
            command += ["--peer-python", torch, "--peer-dtype", peer]
        done &= _run(f"serving: {format}", command)
    return done


def _training(options: Options) -> bool:
    data = ["--data", str(options.data), "--steps", str(options.steps)]
    ours = options.out / "shakespeare_char.json"
    command = [sys.executable, str(HERE / "shakespeare_char.py"), *data, "--json", str(ours)]
    done = _run("training: tpu_stack", command)
    torch = os.environ.get("TORCH_PYTHON")
    if torch is None:
        print("training peer left out: TORCH_PYTHON names no interpreter with PyTorch")
        return done
    theirs = options.out / "nanogpt_torch.json"
    script = str(HERE / "peers" / "nanogpt_torch.py")
    done &= _run("training: PyTorch", [torch, script, *data, "--json", str(theirs)])
    if done:
        _side_by_side(json.loads(ours.read_text()), json.loads(theirs.read_text()))
    return done


def _side_by_side(ours: dict, theirs: dict) -> None:
    rows = [
        ("ms per step", ours["ms_per_step"], theirs["ms_per_step_mean"]),
        ("validation loss", ours["validation_loss"], theirs["validation_loss"]),
        ("seconds: ours to 1.886, PyTorch for all", ours["seconds_to_target"],
         theirs["train_seconds"]),
    ]  # fmt: skip
    print(f"{'':42}{'tpu_stack':>12}{'PyTorch':>12}{'ratio':>8}")
    for name, left, right in rows:
        ratio = f"{left / right:8.2f}" if left is not None else f"{'-':>8}"
        shown = f"{left:12.3f}" if left is not None else f"{'-':>12}"
        print(f"{name:42}{shown}{right:12.3f}{ratio}")


def main() -> int:
    """The command line."""
    options = tyro.cli(Options)
    options.out.mkdir(parents=True, exist_ok=True)
    done = True
    for module in MODULES:
        name = module.split(".")[-2]
        json_file = str(options.out / f"{name}.json")
        done &= _run(name, [sys.executable, "-m", module, "--json", json_file])
    done &= _serving(options)
    if options.data is not None:
        done &= _training(options)
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
