"""From the training layout to the serving layout: which collectives each tensor takes.

On the training mesh, dimension by dimension, until every part that serving holds stands whole on a
training device; then, between different machines, the parts are sent. A split that moves from one
dimension to another is an all-to-all and never grows the tensor; what is left of a split that
serving lacks is an all-gather; what serving splits further is a local slice. Everything is in the
float32 of the master weights, as it is restored, and nothing is assumed to overlap.

    [move.kind for move in moves(row, train, serve)]  # ['all-to-all', 'all-gather', 'send']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np

from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.collectives import AxisLinks
from tpu_stack.planner.links import MeshLinks, one_execution_s
from tpu_stack.planner.pricing import mesh_links
from tpu_stack.planner.tensors import MASTER_DTYPE, TensorRow
from tpu_stack.sharding.profiles import Profile

DEFINITION = (
    "collectives on the training mesh, one after the other, in the float32 of the master weights,"
    " until every serving part stands whole on a training device; then, between different machines,"
    " each serving device is sent its part over the data centre's network at the rate that the"
    " slower side with a published figure has"
)
_ITEMSIZE = np.dtype(MASTER_DTYPE).itemsize


@dataclass(frozen=True)
class Move:
    """One step for one tensor. Bytes are per JAX device.

    Attributes:
      kind: "all-to-all", "all-gather", "slice", "collective-permute" or "send".
      axes: axes of the training mesh it spans; None: no axis. A group has `shards` members, fewer
        than the axes have where only a part is needed.
      dims: the dimensions it changes, (from, to) for an all-to-all.
      shards: members of a group, or parts of a slice; serving devices of a send.
      bytes: payload as `planner.hlo` counts it: the gathered result of an all-gather, what a
        device holds for an all-to-all; of a send, what one serving device receives.
      wire_bytes: what a device puts on the links; 0 for a slice.
      seconds: projected. None where no side's rate is published.
    """

    kind: str
    axes: tuple[str, ...] | None
    dims: tuple[int, ...]
    shards: int
    bytes: int
    wire_bytes: int
    seconds: float | None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        axes = None if self.axes is None else list(self.axes)
        return {**self.__dict__, "axes": axes, "dims": list(self.dims)}


class _Layout:
    """A tensor's parts on the training mesh while moves are applied to it.

    `splits[d]` is the dimension's factors, most significant first: (mesh axis, shards). The axis is
    "" for a split that an all-to-all or a slice brought, which is never taken off again.
    """

    def __init__(self, row: TensorRow, train: Profile):
        self.size = row.spec.size
        self.mesh = train.mesh
        self.splits: list[list[tuple[str, int]]] = [
            [(name, train.mesh[name]) for name in train.rules.mesh_axes(axis)]
            for axis in row.spec.axes
        ]

    def shards(self, dim: int) -> int:
        return prod(shards for _, shards in self.splits[dim])

    @property
    def held(self) -> int:
        """Bytes that a device holds."""
        return _ITEMSIZE * self.size // prod(self.shards(d) for d in range(len(self.splits)))

    def take(self, dim: int, shards: int) -> tuple[str, ...]:
        """Takes the least significant `shards` off a dimension; the mesh axes they lay on."""
        rest, axes, left = list(self.splits[dim]), [], shards
        while left > 1:
            axis, size = rest.pop()
            shared = gcd(size, left)
            if shared < min(size, left):  # sizes that do not divide each other: over all its axes
                every = tuple(name for name, _ in self.splits[dim])
                self.splits[dim] = [(every[0], self.shards(dim) // shards)]
                return every
            axes += [axis] if shared > 1 else []
            rest += [(axis, size // shared)] if shared < size else []
            left //= shared
        self.splits[dim] = rest
        return tuple(reversed(axes))

    def links(self, links: MeshLinks, axes: tuple[str, ...], shards: int) -> AxisLinks:
        """The links of groups of `shards` along these axes; a part of them counts as one link."""
        whole = prod(self.mesh[axis] for axis in axes) == shards
        return links.links(axes if whole else None, shards)


def moves(row: TensorRow, train: Profile, serve: Profile) -> list[Move]:
    """What brings the tensor from its training layout to its serving layout, in order."""
    layout, links = _Layout(row, train), mesh_links(train, train.chip_facts)
    wanted = [
        prod(serve.mesh[name] for name in serve.rules.mesh_axes(axis)) for axis in row.spec.axes
    ]
    dims = range(len(wanted))
    surplus = [layout.shards(d) // gcd(layout.shards(d), wanted[d]) for d in dims]
    lacking = [wanted[d] // gcd(layout.shards(d), wanted[d]) for d in dims]
    found = []
    for source in dims:
        for target in dims:
            shards = gcd(surplus[source], lacking[target])
            if source != target and shards > 1:
                surplus[source] //= shards
                lacking[target] //= shards
                found.append(_all_to_all(layout, links, source, target, shards))
    found += [_all_gather(layout, links, d, surplus[d]) for d in dims if surplus[d] > 1]
    for dim in dims:
        if lacking[dim] > 1:
            layout.splits[dim].append(("", lacking[dim]))
            found.append(Move("slice", None, (dim,), lacking[dim], layout.held, 0, 0.0))
    return found + _hand_over(row, train, serve, links, bool(found))


def _all_to_all(layout: _Layout, links: MeshLinks, source: int, target: int, shards: int) -> Move:
    axes, held = layout.take(source, shards), layout.held // shards
    layout.splits[target].append(("", shards))
    seconds = one_execution_s("all-to-all", held, layout.links(links, axes, shards))
    wire = held * (shards - 1) // shards
    return Move("all-to-all", axes, (source, target), shards, held, wire, seconds)


def _all_gather(layout: _Layout, links: MeshLinks, dim: int, shards: int) -> Move:
    axes = layout.take(dim, shards)
    gathered = layout.held
    seconds = one_execution_s("all-gather", gathered, layout.links(links, axes, shards))
    wire = gathered * (shards - 1) // shards
    return Move("all-gather", axes, (dim,), shards, gathered, wire, seconds)


def _hand_over(
    row: TensorRow, train: Profile, serve: Profile, links: MeshLinks, moved: bool
) -> list[Move]:
    """The send to another machine; on the same one, the permutation where only places differ."""
    received = row.reshard_bytes
    if same_machine(train, serve):
        if moved or not received:
            return []
        seconds = one_execution_s("collective-permute", received, links.links(None, train.devices))
        dims = tuple(range(len(row.spec.shape)))
        return [
            Move("collective-permute", None, dims, train.devices, received, received, seconds)
        ]  # fmt: skip
    rate = network_bytes_per_s(train, serve)
    seconds = None if rate is None else row.reshard_total_bytes / rate
    return [Move("send", None, (), serve.devices, received, received, seconds)]


def same_machine(train: Profile, serve: Profile) -> bool:
    """Whether both profiles are the same chips, as RESHARD_DEFINITION says."""
    return (train.chip, train.devices) == (serve.chip, serve.devices)


def network_bytes_per_s(train: Profile, serve: Profile) -> float | None:
    """What the slower side's chips together move over the data centre's network; of the sides with
    a published figure. None where neither has one."""

    def rate(chip: Chip, chips: int) -> list[float]:
        return [chip.dcn_bytes_per_s.number * chips] if chip.dcn_bytes_per_s else []

    sides = [p for p in (train, serve) if p.chips]
    return min((r for p in sides for r in rate(p.chip_facts, p.chips or 1)), default=None)


def plan(rows: Sequence[TensorRow], train: Profile, serve: Profile) -> dict[str, Any]:
    """The whole model's plan, JSON-ready: moves per tensor in order, totals by kind and axes.

    `collective_s` and `send_s` add up every tensor's; a send of unknown rate leaves `send_s` None.
    """
    by_tensor = {row.spec.name: moves(row, train, serve) for row in rows}
    totals: dict[tuple[str, tuple[str, ...] | None], list[Move]] = {}
    for found in by_tensor.values():
        for move in found:
            totals.setdefault((move.kind, move.axes), []).append(move)
    every = [move for found in by_tensor.values() for move in found]
    sends = [move.seconds for move in every if move.kind == "send"]
    known = [seconds for seconds in sends if seconds is not None]
    silent = [p.chip for p in (train, serve) if p.chip_facts.dcn_bytes_per_s is None]
    return {
        "tensors": {name: [move.as_json() for move in found] for name, found in by_tensor.items()},
        "totals": [_total(kind, axes, found) for (kind, axes), found in totals.items()],
        "same_machine": same_machine(train, serve),
        "collective_s": sum(m.seconds or 0.0 for m in every if m.kind != "send"),
        "send_s": sum(known) if len(known) == len(sends) else None,
        "wire_bytes_per_device": sum(m.wire_bytes for m in every if m.kind != "send"),
        "network_figure_missing_for": [] if same_machine(train, serve) else silent,
        "label": "projected",
        "rung": 4,
    }


def _total(kind: str, axes: tuple[str, ...] | None, found: Sequence[Move]) -> dict[str, Any]:
    seconds = [move.seconds for move in found if move.seconds is not None]
    return {
        "kind": kind,
        "axes": None if axes is None else list(axes),
        "count": len(found),
        "bytes_per_device": sum(move.bytes for move in found),
        "wire_bytes_per_device": sum(move.wire_bytes for move in found),
        "seconds": sum(seconds) if len(seconds) == len(found) else None,
    }
