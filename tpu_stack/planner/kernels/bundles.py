"""Read a kernel's static schedule from the TPU compiler's dumps (rung 3, compiled).

`--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true` makes libtpu write, for each Pallas kernel, its
final VLIW bundles (instructions, one a cycle), the slots of each unit that each bundle fills, and
its memory allocations. The flags are undocumented, so anything unexpected raises DumpError, which
names libtpu's version.

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
    """The bundles of one part of a kernel and the slots that they fill.

    Attributes:
      bundles: their number.
      slots: unit -> slots filled in all of them.
    """

    bundles: int
    slots: dict[str, int]


@dataclass(frozen=True)
class Schedule:
    """One Pallas kernel's static schedule.

    Invariants: `loop.bundles + outside.bundles == bundles`; every unit of `capacity` is in both
    regions' slots. Predicated bundles, such as a store in the last step, count in every step. The
    two iterations in which a pipelined loop only fills or drains do not count. A loop inside the
    grid loop counts as one iteration, since its trip count is unknown (`inner_loops`).

    Attributes:
      name: the kernel's name.
      bundles: the bundles of the whole kernel, each counted once.
      loop: the loop over grid steps; empty when the grid has one step.
      outside: what runs once.
      capacity: unit -> slots per bundle.
      grid: steps per axis, as the compiler bounds them; `UNBOUNDED` for a dynamic axis until
        `with_steps` sets it, perhaps to an average.
      inner_loops: how many loops are nested in the grid loop.
      vmem_bytes: the highest VMEM address in use.
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
        """Bundles that one call issues: the grid loop once per step, the rest once."""
        return round(self.loop.bundles * math.prod(self.grid)) + self.outside.bundles

    @property
    def bounded(self) -> bool:
        """Whether all axes of the grid are known; otherwise `steps` and `executed` mean nothing."""
        return UNBOUNDED not in self.grid

    def with_steps(self, steps: float) -> "Schedule":
        """The same schedule with `steps`, perhaps an average, on the dynamic axis of the grid."""
        return replace(self, grid=tuple(steps if n == UNBOUNDED else n for n in self.grid))

    def as_json(self) -> dict[str, Any]:
        """JSON-ready; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Schedule":
        loop, outside = Region(**data["loop"]), Region(**data["outside"])
        return cls(**(data | {"loop": loop, "outside": outside, "grid": tuple(data["grid"])}))


def read_schedules(folder: Path) -> list[Schedule]:
    """The schedule of every Pallas kernel in the dump in `folder`, in the dump's order.

    Raises: DumpError when there is none, or a file is missing or has another format.
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
    """Slots per bundle of each unit, and a row of filled slots for each bundle.

    libtpu spells the header "== CAPACTIY:".

    Raises: DumpError for any other format.
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
