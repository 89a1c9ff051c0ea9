"""What one collective is, what it sends, and how a program's collectives add up.

Example:
    rows = summarize(found)
    [(row.kind, row.axes_label, row.count, row.bytes) for row in rows]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tpu_stack.planner.hlo_source import Part

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
UNMATCHED = "unmatched"


@dataclass(frozen=True)
class Collective:
    """One collective instruction at one place where the program runs it.

    Attributes:
      bytes: the payload per device of one execution, as compiled.
      trips: how often it runs; None when an enclosing loop's count is unknown.
      axes: the mesh axes that it spans, in mesh order; None when its groups are no set of whole
        axes. group_size: the devices of one group.
      overlapped: whether it is asynchronous.
      as_written: the payload with XLA:CPU's rewrites undone (`hlo_source`).
      purpose: what it is for (`hlo_attribution`).
      cover_cycles: the compiler's estimate of what it scheduled between the start and the end of
        one execution; None where it is not asynchronous.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    trips: int | None
    axes: tuple[str, ...] | None
    group_size: int
    op_name: str
    overlapped: bool
    as_written: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    purpose: str = ""
    cover_cycles: int | None = None

    @property
    def total_bytes(self) -> int | None:
        """Payload per device over the whole program; None when the trips are unknown."""
        return None if self.trips is None else self.bytes * self.trips

    @property
    def wire_bytes(self) -> float:
        """Bytes each device must send in one execution (`wire_bytes`)."""
        return wire_bytes(self.kind, self.bytes, self.group_size)


@dataclass(frozen=True)
class CollectiveRow:
    """All collectives of one kind over the same axes.

    `sites` counts instructions; `count`, `bytes`, `wire_bytes` and `overlapped_bytes` sum over
    executions whose number is known; `unknown_sites` are left out of them, so a row with any is a
    lower bound.
    """

    kind: str
    axes: tuple[str, ...] | None
    sites: int = 0
    count: int = 0
    bytes: int = 0
    wire_bytes: float = 0.0
    overlapped_bytes: int = 0
    unknown_sites: int = 0

    @property
    def axes_label(self) -> str:
        """`fsdp+tensor`, `none` for groups of one device, or `unmatched`."""
        return UNMATCHED if self.axes is None else "+".join(self.axes) or "none"


def wire_bytes(kind: str, payload: int, group_size: int) -> float:
    """Bytes each device must send for a payload of `payload` bytes in a group of `group_size`.

    These are the lower bounds that ring algorithms reach (Thakur, Rabenseifner, Gropp 2005):
    (n-1)/n of the payload, twice that for an all-reduce. A permute or broadcast sends all of it.
    """
    if group_size <= 1:
        return 0.0
    if kind in ("collective-permute", "collective-broadcast"):
        return float(payload)
    share = payload * (group_size - 1) / group_size
    return 2 * share if kind == "all-reduce" else share


def summarize(found: Sequence[Collective], as_written: bool = False) -> list[CollectiveRow]:
    """Rows by (kind, axes), the most wire bytes first.

    With `as_written`, XLA:CPU's rewrites are undone: the rows say what the program asks a TPU for.
    """
    rows: dict[tuple[str, tuple[str, ...] | None], CollectiveRow] = {}
    for item in found:
        parts = item.as_written if as_written else (Part(item.kind, item.dtype, item.bytes),)
        for kind in dict.fromkeys(part.kind for part in parts):
            payload = sum(part.bytes for part in parts if part.kind == kind)
            key = (kind, item.axes)
            rows[key] = _add(rows.get(key, CollectiveRow(*key)), item, kind, payload)
    return sorted(rows.values(), key=lambda row: (-row.wire_bytes, row.kind, row.axes_label))


def _add(row: CollectiveRow, item: Collective, kind: str, payload: int) -> CollectiveRow:
    if item.trips is None:
        return replace(row, sites=row.sites + 1, unknown_sites=row.unknown_sites + 1)
    moved = payload * item.trips
    return replace(
        row,
        sites=row.sites + 1,
        count=row.count + item.trips,
        bytes=row.bytes + moved,
        wire_bytes=row.wire_bytes + wire_bytes(kind, payload, item.group_size) * item.trips,
        overlapped_bytes=row.overlapped_bytes + (moved if item.overlapped else 0),
    )
