"""All that the planner reads from one compiled program, as one value that converts to JSON.

Example:
    report = read_program(result.hlo_text(), {"data": 1, "fsdp": 64, "tensor": 1})
    [(row.kind, row.axes_label, row.bytes) for row in summarize(report.collectives)]
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tpu_stack.planner.hlo import collectives_of
from tpu_stack.planner.hlo_collective import Collective
from tpu_stack.planner.hlo_cycles import Operation, operations
from tpu_stack.planner.hlo_frames import Frames
from tpu_stack.planner.hlo_source import Part
from tpu_stack.planner.hlo_text import parse


@dataclass(frozen=True)
class ProgramReport:
    """A compiled program: its collectives in program order, its operations by estimated cycles.

    Operations are the instructions with an estimate from the compiler's cost model and those that
    lack one (`hlo_cycles.Operation`). Cycles are those of one device.
    """

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]

    @property
    def cycles(self) -> int:
        """Sum of the estimated cycles, as if nothing overlapped; collectives have none."""
        return sum(item.total_cycles for item in self.operations)

    @property
    def unestimated(self) -> int:
        """Pallas kernels and products without an estimate, whose cycles are not in the sum."""
        return sum(item.cycles is None for item in self.operations)

    def as_json(self) -> dict[str, Any]:
        return {
            "collectives": [asdict(item) for item in self.collectives],
            "operations": [asdict(item) for item in self.operations],
            "cycles": self.cycles,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ProgramReport":
        """The inverse of `as_json`. Raises KeyError or TypeError for anything else."""
        return cls(
            tuple(_collective(item) for item in data["collectives"]),
            tuple(Operation(**item) for item in data["operations"]),
        )


def read_program(text: str, mesh: Mapping[str, int]) -> ProgramReport:
    """Reads the text of a compiled program. `mesh`: axis -> size, in the mesh's own order.

    Raises ValueError when the text is no HLO module or was compiled for another number of devices.
    """
    module, frames = parse(text), Frames.of(text)
    found = collectives_of(module, tuple(mesh.values()), tuple(mesh), frames)
    return ProgramReport(tuple(found), tuple(operations(module, frames)))


def _collective(data: Mapping[str, Any]) -> Collective:
    known = {field.name for field in fields(Collective)}
    values = {name: value for name, value in data.items() if name in known}
    values["shapes"] = tuple(map(tuple, data["shapes"]))
    values["axes"] = None if data["axes"] is None else tuple(data["axes"])
    values["as_written"] = tuple(Part(*item) for item in data["as_written"])
    values["notes"] = tuple(data["notes"])
    return Collective(**values)
