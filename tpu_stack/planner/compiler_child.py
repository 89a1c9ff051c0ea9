"""A child process that holds the TPU compiler: its environment, its time limit, and how it died.

A bad program can abort the compiler, and the whole process with it, so nothing here compiles in
the process that asks. `planner.kernels` and `planner.aot` both start their compilers through this.

    with CompilerChild("tpu_stack.planner.aot.child", folder) as child:
        while line := child.next_line(timeout_s=60, prefix="{"):
            print(line)
        print(child.death().message)
"""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tpu_stack.kernels.compiled import ENVIRONMENT

_KILLED = (-9, -15)


@dataclass(frozen=True)
class Death:
    """How a child ended.

    Attributes:
      message: one line with the last thing it said of an error.
      late: it was ended because it took too long.
      lasting: the same compile would come to the same again; a kill from outside would not.
    """

    message: str
    late: bool
    lasting: bool


class CompilerChild:
    """One run of `python -m module FOLDER`; its standard error goes to a file in the folder.

    A context manager: leaving it ends the child whatever it is doing.
    """

    def __init__(self, module: str, folder: Path, extra_environment: dict[str, str] | None = None):
        self._log = folder / "stderr"
        self._late = False
        self._timeout_s = 0.0
        env = os.environ | ENVIRONMENT | (extra_environment or {})
        with self._log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                env=env, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def next_line(self, timeout_s: float, prefix: str) -> str:
        """The child's next line that starts with `prefix`; "" when it ended or was late."""
        assert self._process.stdout is not None
        self._timeout_s = timeout_s
        timer = threading.Timer(max(0.0, timeout_s), self._end_late)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(prefix):
                    return line
            return ""
        finally:
            timer.cancel()

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def death(self, limit_s: float | None = None) -> Death:
        """How it ended; waits for its end. `limit_s` is the time it had, where the last
        `next_line` was given only what was left of it."""
        status = self._process.wait()
        if self._late:
            limit = self._timeout_s if limit_s is None else limit_s
            return Death(f"the compiler took over {limit:g} s", late=True, lasting=False)
        said = self._log.read_text(errors="replace").splitlines()
        lines = [line.strip() for line in said if line.strip()]
        told = [line for line in lines if "Error: " in line or "Check failed" in line] or lines
        how = f"aborted, signal {-status}" if status < 0 else f"ended with status {status}"
        last = told[-1][:300] if told else "no message"
        return Death(f"the compiler {how}: {last}", False, status not in _KILLED)


class Deadline:
    """Seconds left of a time limit that covers several waits."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()
