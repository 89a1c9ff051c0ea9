"""What of a program's collectives the rest of the program hides, projected (rung 4).

A collective's own time is projected over the links of the chip compiled for; what the compiler
scheduled between its start and its end is taken at its own estimate of cycles. What is longer than
that is exposed; a collective that is not asynchronous is exposed whole. Two collectives in flight
at once are each given all of what lies between, so the sum is a lower bound.

    for item, time in zip(result.report.collectives, result.exposures):
        print(item.purpose, time.exposed_s)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.hlo_collective import Collective
from tpu_stack.planner.links import MeshLinks, one_execution_s


@dataclass(frozen=True)
class Exposure:
    """One collective over the whole program, in projected seconds.

    `cover_s` is 0 where it is not asynchronous; both are 0 where a loop's trips are unknown.
    """

    own_s: float
    cover_s: float

    @property
    def exposed_s(self) -> float:
        """What nothing hides."""
        return max(0.0, self.own_s - self.cover_s)


def exposures(
    found: Sequence[Collective], links: MeshLinks, clock_hz: float | None
) -> tuple[Exposure, ...]:
    """One per collective, in program order. Kinds are as compiled.

    Without a clock (v4) there is no cover: everything counts as exposed.
    """
    rows = []
    for item in found:
        trips = item.trips or 0
        own = cover = 0.0
        if item.axes != () and item.group_size > 1:
            own = one_execution_s(item.kind, item.bytes, links.links(item.axes, item.group_size))
        if clock_hz is not None and item.cover_cycles is not None:
            cover = item.cover_cycles / clock_hz
        rows.append(Exposure(own * trips, cover * trips))
    return tuple(rows)


def links_of(
    topology: str, chip: str, mesh: dict[str, int], wrap: tuple[bool, ...] | None = None
) -> MeshLinks:
    """Where a mesh lies on a topology of the compiler, `v5p:4x4x4`. Needs JAX, for chip facts.

    `wrap`: which of its axes close into rings; the chip's own rule where None.
    """
    sizes = tuple(int(size) for size in topology.partition(":")[2].split("x"))
    return MeshLinks(get_chip(chip), sizes, mesh, wrap=wrap)
