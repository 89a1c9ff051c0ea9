"""How often each bundle of a compiled kernel is issued: the loops of its final listing.

A kernel's static bundles count each loop body once; what one call issues is what decides its time.
The dump's layout is undocumented, so anything unexpected is an error that names the version.

    issued(Path("dump"), "matmul", (28,))  # a grid of 28 steps
"""

import importlib.metadata
import math
import re
from collections.abc import Sequence
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(\s*\})?")


def libtpu_version() -> str:
    """The installed libtpu's version, or "not installed"."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class DumpError(RuntimeError):
    """The dump is not as this libtpu's reader expects. The message names the version."""

    def __init__(self, what: str):
        super().__init__(f"libtpu {libtpu_version()}: {what}")


def loop_depths(code: str, name: str) -> tuple[list[int], int]:
    """How deep in loops each bundle of a final listing is, and how many loops there are.

    The listing marks depth with ">", but an empty bundle carries no mark: it is as deep as the
    shallower of its neighbours. Raises DumpError for a listing without bundles.
    """
    marks: list[int | None] = []
    loops = 0
    for line in code.splitlines():
        found = _BUNDLE.match(line)
        if found:
            depth = found[2].count(">")
            marks.append(None if found[3] and not depth else depth)
            loops += found[1] == "LB"
    if not marks:
        raise DumpError(f"{name}: the final listing has no bundles")
    return _filled(marks), loops


UNBOUNDED = 2**31 - 1
"""Steps that the compiler states for an axis of the grid that is known only when it runs."""
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+)\)")


def grid_bounds(code: str) -> tuple[int, ...]:
    """Steps per axis of the grid of a final listing, as the compiler bounds them; (1,) without."""
    bounds = [tuple(map(int, found.split(","))) for found in _GRID.findall(code)]
    return max(bounds, key=math.prod, default=(1,))


def issued(folder: Path, name: str, trips: Sequence[int]) -> int:
    """Bundles that one call of the kernel issues: those at depth d once per turn of d loops.

    Args:
      name: the kernel's in the dump, in part.
      trips: turns of the outermost loop (the grid's steps, where the listing does not state them),
        of a loop inside it, and so on. A kernel of one step has no loop; loops deeper than `trips`
        turn once.

    Raises: DumpError when `folder` has no listing of it, or one without bundles.
    """
    for path in sorted(folder.glob(f"*-{name}*-final_bundles.txt")):
        if not path.name.endswith("schedule-analysis_final_bundles.txt"):
            code = path.read_text()
            depths, _ = loop_depths(code, name)
            bounds = grid_bounds(code)
            if UNBOUNDED not in bounds and math.prod(bounds) > 1:
                trips = (math.prod(bounds), *trips[1:])
            return sum(math.prod(trips[:depth]) for depth in depths)
    raise DumpError(f"{name}: no final listing among {len(list(folder.iterdir()))} dump files")


def _filled(marks: list[int | None]) -> list[int]:
    after, following = 0, [0] * len(marks)
    for i in range(len(marks) - 1, -1, -1):
        following[i] = after
        after = after if marks[i] is None else marks[i] or 0
    depths, before = [], 0
    for mark, ahead in zip(marks, following, strict=True):
        before = min(before, ahead) if mark is None else mark
        depths.append(before)
    return depths
