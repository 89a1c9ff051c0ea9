"""Driving the child that holds the TPU compiler: many requests, a crash costs only its own.

>>> for answer in answers([{"index": 0, "op": "quantized_matmul", ...}], timeout_s=300): ...
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_stack.planner.kernels.bundles import DumpError, Schedule, read_schedules

CHILD = f"{__package__}.compile_child"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Answer:
    """What came of one request. Without an `error` there are `schedules`, one per Pallas kernel.

    `lasting` says that the same compile would come to the same again.
    """

    index: int
    schedules: list[Schedule] = field(default_factory=list)
    xla_cycles: int | None = None
    error: str | None = None
    lasting: bool = True


def answers(requests: list[dict[str, Any]], timeout_s: float) -> Iterator[Answer]:
    """Compiles the requests in order, each with a distinct "index".

    Yields: one answer per request, as it comes: schedules, the compiler's refusal, an abort, or
      that it took longer than `timeout_s`.
    """
    left = list(requests)
    while left:
        with tempfile.TemporaryDirectory() as name:
            for answer in _one_child(left, Path(name), timeout_s):
                left = left[1:]
                yield answer


def _one_child(requests: list[dict[str, Any]], folder: Path, timeout_s: float) -> Iterator[Answer]:
    """Answers until the child has done all or has died; the request it died of is answered."""
    (folder / "dump").mkdir()
    (folder / "requests.json").write_text(json.dumps(requests))
    flags = f"--xla_jf_dump_to={folder / 'dump'} --xla_jf_dump_llo_text=true"
    env = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
    command = [sys.executable, "-m", CHILD, str(folder)]
    log = folder / "stderr"
    waiting = [request["index"] for request in requests]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as child,
    ):
        try:
            while waiting:
                line, late = _next_line(child, timeout_s)
                if not line:
                    yield _death(waiting[0], child.wait(), log, timeout_s if late else None)
                    return
                yield _answer(json.loads(line), folder)
                waiting.pop(0)
        finally:
            child.kill()


def _next_line(child: subprocess.Popen[str], timeout_s: float) -> tuple[str, bool]:
    """The child's next line of JSON ("" when it ended) and whether it was ended for its time."""
    assert child.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(timeout_s, end)
    timer.start()
    try:
        for line in child.stdout:
            if line.startswith('{"index"'):
                return line, False
        return "", late.is_set()
    finally:
        timer.cancel()


def _answer(found: dict[str, Any], folder: Path) -> Answer:
    index = found["index"]
    if "error" in found:
        return Answer(index, error=found["error"])
    try:
        schedules = read_schedules(folder / "dump" / str(index))
    except DumpError as error:
        return Answer(index, error=str(error), lasting=False)
    return Answer(index, schedules, found["estimated_cycles"])


def _death(index: int, status: int, log: Path, timed_out: float | None) -> Answer:
    if timed_out is not None:
        return Answer(index, error=f"the compiler took over {timed_out:g} s", lasting=False)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line or "Check failed" in line] or lines
    how = f"aborted, signal {-status}" if status < 0 else f"ended with status {status}"
    last = told[-1][:300] if told else "no message"
    return Answer(index, error=f"the compiler {how}: {last}", lasting=status not in (-9, -15))
