"""Ctrl-C, SIGTERM and a full disk: one line, the right status, and nothing half-written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = [
    "--text.tokenizer", "bpe:300", "--train.batch-size", "8", "--train.seq-len", "32",
    "--train.compute-dtype", "float32", "--train.remat", "none",
]  # fmt: skip
LIMIT_BLOCKS = 300
"""A file-size limit in KiB: what a quota or a full disk looks like to who writes a checkpoint."""


def start(argv: list[str], shell_prefix: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tpu_stack.cli.main", *argv]
    return subprocess.Popen(
        ["bash", "-c", f'{shell_prefix}exec "$@"', "bash", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    path = tmp_path / "plays.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return path


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run never got that far"
        time.sleep(0.05)


def in_charge(process: subprocess.Popen[str]) -> bool:
    """Whether the command has taken SIGALRM, as it does first (Linux's mask of caught signals)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGALRM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_resumes(number, tmp_path, plays):
    out = tmp_path / "run"
    argv = ["train", "--out", str(out), "--data", str(plays), *SMALL]
    process = start([*argv, "--train.steps", "100000", "--train.log-every", "1"])
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    (step,) = [int(path.name) for path in (out / "checkpoints").iterdir()]
    resumed = start([*argv, "--train.steps", str(step + 1), "--resume"])
    output, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"at step {step + 1}" in output


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to know when to interrupt")
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
def test_ctrl_c_at_any_moment_is_one_line(delay, tmp_path, plays):
    """From the moment that the command is in charge; before that it is the interpreter's own."""
    out = tmp_path / "run"
    argv = ["train", "--out", str(out), "--data", str(plays), *SMALL]
    process = start([*argv, "--train.steps", "100000"])
    wait_for(lambda: in_charge(process), process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    leftovers = [path for path in out.rglob("*") if "tmp" in path.name] if out.exists() else []
    assert leftovers == []


def test_a_full_disk_is_one_line_and_leaves_no_checkpoint(tmp_path, plays):
    out = tmp_path / "run"
    argv = ["train", "--out", str(out), "--data", str(plays), *SMALL, "--train.steps", "1"]
    process = start(argv, shell_prefix=f"ulimit -f {LIMIT_BLOCKS}; ")
    _, errors = process.communicate(timeout=180)
    assert process.returncode in (1, 2), errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("tpu-stack: error: ")
    assert "not written" in line
    assert list((out / "checkpoints").iterdir()) == []
