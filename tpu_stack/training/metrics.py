"""Metrics to `metrics.jsonl` (one object a line) and to TensorBoard event files.

>>> with MetricsWriter(Path("runs"), resume_at=0) as metrics:
...     metrics.write(10, {"loss": 3.2})
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter

from tpu_stack.errors import UserError
from tpu_stack.files import write_text


class MetricsWriter:
    """Appends to the run's metrics; entries beyond the step a run resumes at are dropped first."""

    def __init__(self, out: Path, resume_at: int):
        path = out / "metrics.jsonl"
        kept = ""
        if resume_at and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= resume_at)
        write_text(path, kept)
        try:
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=resume_at + 1)
        except OSError as error:
            raise UserError(f"cannot write metrics to {out}: {error.strerror}") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line and one TensorBoard point per value. Raises UserError when the disk is full."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(f"cannot write metrics: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()
