"""Drives the child process that runs the TPU compiler; a crash fails only its own request.

for answer in answers([{"index": 0, "op": "quantized_matmul", ...}], timeout_s=300): ...
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpu_stack.kernels.compiled.loops import DumpError
from tpu_stack.planner.compiler_child import CompilerChild
from tpu_stack.planner.kernels.bundles import Schedule, read_schedules

CHILD = f"{__package__}.compile_child"


@dataclass(frozen=True)
class Answer:
    """The result of one request. Without an `error` there are `schedules`, one per Pallas kernel.

    `lasting`: the same compile would give the same result again, so it may be cached.
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
    """Answers until the child is done or dies; the request that it dies of gets an error."""
    (folder / "dump").mkdir()
    (folder / "requests.json").write_text(json.dumps(requests))
    flags = f"--xla_jf_dump_to={folder / 'dump'} --xla_jf_dump_llo_text=true"
    waiting = [request["index"] for request in requests]
    with CompilerChild(CHILD, folder, {"LIBTPU_INIT_ARGS": flags}) as child:
        while waiting:
            line = child.next_line(timeout_s, '{"index"')
            if not line:
                death = child.death()
                yield Answer(waiting[0], error=death.message, lasting=death.lasting)
                return
            yield _answer(json.loads(line), folder)
            waiting.pop(0)


def _answer(found: dict[str, Any], folder: Path) -> Answer:
    index = found["index"]
    if "error" in found:
        return Answer(index, error=found["error"])
    try:
        schedules = read_schedules(folder / "dump" / str(index))
    except DumpError as error:
        return Answer(index, error=str(error), lasting=False)
    return Answer(index, schedules, found["estimated_cycles"])
