"""Bundles that one call of a compiled kernel issues, from the loops of its final listing.

Static bundles count each loop body once; the bundles issued decide the time. The dump's format is
undocumented, so anything unexpected is an error that names the version.

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
    """The dump does not have the format that this reader expects. The message names the version."""

    def __init__(self, what: str):
        super().__init__(f"libtpu {libtpu_version()}: {what}")


def loop_depths(code: str, name: str) -> tuple[list[int], int]:
    """Loop depth of each bundle of a final listing, and the number of loops.

    The listing marks depth with ">". An empty bundle has no mark and counts as deep as its
    shallower neighbour.

    Raises: DumpError for a listing without bundles.
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
"""The bound that the compiler writes for a grid axis whose size is known only at run time."""
_GRID = re.compile(r"iteration_bounds: \(([\d, ]+)\)")


def grid_bounds(code: str) -> tuple[int, ...]:
    """Grid steps per axis, as the compiler's final listing bounds them; (1,) without a grid."""
    bounds = [tuple(map(int, found.split(","))) for found in _GRID.findall(code)]
    return max(bounds, key=math.prod, default=(1,))


def issued(folder: Path, name: str, trips: Sequence[int]) -> int:
    """Bundles that one call of the kernel issues: each bundle times the trip counts around it.

    Args:
      name: part of the kernel's name in the dump.
      trips: trip counts from the outermost loop inwards. The first is the grid's steps, which the
        listing overrides where it states them. A grid of one step has no loop. Loops deeper than
        `trips` count once.

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
