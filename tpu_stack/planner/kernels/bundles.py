"""Reading a kernel's static schedule out of the TPU compiler's dumps (rung 3, compiled).

`--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true` makes libtpu write, for each Pallas kernel, the
final VLIW bundles, one row per bundle of how many slots of each unit it fills, and the memory it
allocated. The flags are undocumented, so anything unexpected is an error that names the version.

    read_schedules(Path("dump"))[0].bundles  # 1295
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tpu_stack.kernels.compiled import total_bundles
from tpu_stack.kernels.compiled.loops import UNBOUNDED, DumpError, grid_bounds, loop_depths

ANALYSIS = "schedule-analysis_final_bundles.txt"
BUNDLES = "final_bundles.txt"
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
ALLOCATIONS = "post-delay-converter.txt"

_STEM = re.compile(r"^(\d+-.+?)-\d+-" + re.escape(ANALYSIS) + "$")
_VMEM = re.compile(r"space=vmem, size = 0x([0-9a-f]+)(?:, offset = 0x([0-9a-f]+))?")


@dataclass(frozen=True)
class Region:
    """Bundles of one part of the kernel and the slots they fill.

    Attributes:
      bundles: how many.
      slots: unit -> slots filled, over all of these bundles.
    """

    bundles: int
    slots: dict[str, int]


@dataclass(frozen=True)
class Schedule:
    """One Pallas kernel's static schedule.

    Invariants: `loop.bundles + outside.bundles == bundles`; every unit of `capacity` is in both
    regions' slots. Predicated bundles (a store that only the last step does) count as executed at
    every step; the two turns that a pipelined loop makes without computing do not count; and a loop
    inside the grid's loop counts once, its trip count being unknown: see `inner_loops`.

    Attributes:
      name: the kernel's.
      bundles: all of it, each once.
      loop: the loop over grid steps; empty when the grid is one step.
      outside: what runs once.
      capacity: unit -> slots per bundle.
      grid: steps per axis, as the compiler bounds them; `UNBOUNDED` where it cannot. Where data
        decide it may be an average (`with_steps`).
      inner_loops: loops nested in the grid's loop.
      vmem_bytes: highest VMEM address in use.
    """

    name: str
    bundles: int
    loop: Region
    outside: Region
    capacity: dict[str, int]
    grid: tuple[float, ...]
    inner_loops: int
    vmem_bytes: int

    @property
    def steps(self) -> int:
        return round(math.prod(self.grid))

    @property
    def executed(self) -> int:
        """Bundles issued in one call: the loop at every step, and the rest once."""
        return round(self.loop.bundles * math.prod(self.grid)) + self.outside.bundles

    @property
    def bounded(self) -> bool:
        """Whether all axes of the grid are known, so that `steps` and `executed` mean something."""
        return UNBOUNDED not in self.grid

    def with_steps(self, steps: float) -> "Schedule":
        """The same schedule where the axis that the compiler could not bound has `steps`, which may
        be an average."""
        return replace(self, grid=tuple(steps if n == UNBOUNDED else n for n in self.grid))

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Schedule":
        loop, outside = Region(**data["loop"]), Region(**data["outside"])
        return cls(**(data | {"loop": loop, "outside": outside, "grid": tuple(data["grid"])}))


def read_schedules(folder: Path) -> list[Schedule]:
    """The schedule of every Pallas kernel that the dump in `folder` holds, in its order.

    Raises: DumpError when there is none, a file is missing, or its text is not as expected.
    """
    found = []
    for path in sorted(folder.glob(f"*-{ANALYSIS}")):
        text = path.read_text()
        stem = _STEM.match(path.name)
        if "tpu_custom_call" in text and stem and not stem[1].endswith("-TLP"):
            found.append(_read_one(folder, stem[1], text))
    if not found:
        count = len(list(folder.iterdir()))
        raise DumpError(f"no schedule of a Pallas kernel among {count} dump files")
    return found


def _read_one(folder: Path, stem: str, analysis: str) -> Schedule:
    name = stem.split("-", 1)[1]
    total = total_bundles(analysis)
    if total is None:
        raise DumpError(f"{name}: the schedule analysis states no total of bundles")
    capacity, rows = read_utilization(_text(folder, stem, UTILIZATION), name)
    code = _text(folder, stem, BUNDLES)
    depths, loops = loop_depths(code, name)
    if not len(rows) == len(depths) == total:
        raise DumpError(
            f"{name}: {total} bundles by the analysis, {len(depths)} in the listing and "
            f"{len(rows)} rows of utilization"
        )
    inside = [row for row, depth in zip(rows, depths, strict=True) if depth]
    outside = [row for row, depth in zip(rows, depths, strict=True) if not depth]
    grid = grid_bounds(code)
    allocated = _VMEM.findall(_text(folder, stem, ALLOCATIONS))
    return Schedule(
        name=re.sub(r"\.\d+$", "", name),
        bundles=len(rows),
        loop=_region(inside, capacity),
        outside=_region(outside, capacity),
        capacity=capacity,
        grid=grid if inside else (1,),
        inner_loops=max(0, loops - 1),
        vmem_bytes=max((int(size, 16) + int(at or "0", 16) for size, at in allocated), default=0),
    )


def _text(folder: Path, stem: str, suffix: str) -> str:
    pattern = re.compile(re.escape(stem) + r"-\d+-" + re.escape(suffix) + "$")
    for path in folder.iterdir():
        if pattern.match(path.name):
            return path.read_text()
    raise DumpError(f"{stem.split('-', 1)[1]}: no {suffix} in the dump")


def read_utilization(text: str, name: str) -> tuple[dict[str, int], list[list[int]]]:
    """Slots per bundle of each unit, and one row of filled slots per bundle.

    The header that libtpu writes is "== CAPACTIY:", its spelling. Raises DumpError.
    """
    lines = text.splitlines()
    if len(lines) < 4 or not lines[0].startswith("== CAPA") or "UTILIZATION" not in lines[3]:
        raise DumpError(f"{name}: the utilization dump does not start with capacities")
    units = [unit.strip() for unit in lines[1].split(",")]
    try:
        slots = [int(slot) for slot in lines[2].split()]
        rows = [[int(slot) for slot in line.split()] for line in lines[4:] if line.strip()]
    except ValueError as error:
        raise DumpError(f"{name}: the utilization dump has no numbers: {error}") from error
    if len(units) != len(slots) or any(len(row) != len(units) for row in rows):
        raise DumpError(f"{name}: the utilization dump has rows that are not {len(units)} units")
    return dict(zip(units, slots, strict=True)), rows


def _region(rows: list[list[int]], capacity: dict[str, int]) -> Region:
    totals = [sum(column) for column in zip(*rows, strict=True)] or [0] * len(capacity)
    return Region(len(rows), dict(zip(capacity, totals, strict=True)))
