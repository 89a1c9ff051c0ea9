"""How long a program's collectives take over a chip's links, given where its mesh axes lie.

A mesh axis lies on the torus axes whose sizes multiply to its own, the last mesh axis on the last
of them, and uses one link per direction of each (scaling-book: an all-gather over k axes is k times
as fast). Where those axes wrap round it is a ring of both directions, else a line. An axis that
fits no set of torus axes is taken to use one link. Devices of one chip are neighbours on the last
mesh axis that has an even size.

    seconds = collective_seconds(found, MeshLinks(get_chip("8t"), (4, 4, 4), profile.mesh))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import NamedTuple

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.collectives import HOP_S, AxisLinks, axis_links
from tpu_stack.hardware.slices import wraps
from tpu_stack.planner.hlo import Collective

Key = tuple[str, tuple[str, ...] | None]


class _TorusAxis(NamedTuple):
    """Chips along a torus axis, and whether it closes into a ring."""

    size: int
    ring: bool


@dataclass(frozen=True)
class MeshLinks:
    """A mesh of JAX devices on a slice of a chip.

    Attributes:
      topology: chips along each torus axis. wrap: for each whether it closes into a ring; the
        chip's own rule (`hardware.slices.wraps`) where None, a proxy's otherwise.
      hop_s: the least time of a hop; at 0, bandwidth alone counts.
    """

    chip: Chip
    topology: tuple[int, ...]
    mesh: Mapping[str, int]
    hop_s: float = HOP_S
    wrap: tuple[bool, ...] | None = None

    @property
    def chips(self) -> int:
        """Chips the mesh fills. Raises UserError when its devices do not fill whole chips."""
        devices, per_chip = prod(self.mesh.values()), self.chip.devices(1)
        if devices % per_chip:
            raise UserError(f"{devices} devices do not fill {self.chip.name} chips of {per_chip}")
        return devices // per_chip

    @property
    def _axes(self) -> list[_TorusAxis]:
        """The torus axes of more than one chip."""
        wrap = wraps(self.chip, self.topology) if self.wrap is None else self.wrap
        return [
            _TorusAxis(size, ring)
            for size, ring in zip(self.topology, wrap, strict=True)
            if size > 1
        ]

    def _chip_axis(self) -> str | None:
        """The mesh axis along which the devices of one chip are neighbours."""
        if self.chip.devices(1) == 1:
            return None
        even = [axis for axis, size in self.mesh.items() if size % self.chip.devices(1) == 0]
        return even[-1] if even else None

    def _torus_axes(self) -> dict[str, tuple[_TorusAxis, ...]]:
        """Torus axes that each mesh axis lies on; mesh axes that fit none are left out."""
        left, found = self._axes, {}
        for axis in reversed(tuple(self.mesh)):
            size = self.mesh[axis]
            size //= self.chip.devices(1) if axis == self._chip_axis() else 1
            fit = _whole_axes(left, size)
            if fit is not None:
                found[axis] = fit
                for used in fit:
                    left.remove(used)
        return found

    def links(self, axes: Sequence[str] | None, group_size: int) -> AxisLinks:
        """The links between the members of a collective over these mesh axes (None: unmatched).

        A ring where all torus axes that they lie on wrap, else a line; one link per direction of
        each.
        """
        if axes is None:
            return self._unmatched(group_size, None)
        devices = prod(self.mesh[axis] for axis in axes)
        whole = self._chip_axis() in axes if self.chip.devices(1) > 1 else None
        plain = self._unmatched(devices, whole)
        torus = self._torus_axes()
        spanned = [axis for axis in axes if self.mesh[axis] > 1]
        if plain.kind == "direct" or not spanned or any(axis not in torus for axis in spanned):
            return plain
        on = [torus_axis for axis in spanned for torus_axis in torus[axis]]
        together = dataclasses.replace(
            plain,
            kind="ring" if all(axis.ring for axis in on) else "line",
            bytes_per_s_one_way=plain.bytes_per_s_one_way * max(1, len(on)),
        )
        return self._within(together, on)

    def _unmatched(self, devices: int, whole_chips: bool | None) -> AxisLinks:
        """One link a direction: a ring where whole axes that wrap have as many members, or a line.

        No two members are more hops apart than the diameter of the slice, or than n - 1.
        """
        links = axis_links(self.chip, devices, ring=False, whole_chips=whole_chips)
        if links.kind == "direct":
            hops = max(1, min(links.max_hops, links.n - 1))
            return dataclasses.replace(links, max_hops=hops, hop_s=self.hop_s)
        if _whole_axes([axis for axis in self._axes if axis.ring], links.n):
            links = dataclasses.replace(links, kind="ring")
        return self._within(links, self._axes)

    def _within(self, links: AxisLinks, axes: Sequence[_TorusAxis]) -> AxisLinks:
        """The same links, charged at most the hops across these torus axes."""
        across = sum(axis.size // 2 if axis.ring else axis.size - 1 for axis in axes)
        share = min(1.0, across / links.hops) if links.hops else 1.0
        return dataclasses.replace(links, hop_s=self.hop_s * share)


def _whole_axes(axes: Sequence[_TorusAxis], members: int) -> tuple[_TorusAxis, ...] | None:
    """The fewest of `axes`, the last ones first, whose sizes multiply to `members`; None: there are
    none."""
    for count in range(len(axes) + 1):
        sets = [c for c in combinations(axes, count) if prod(axis.size for axis in c) == members]
        if sets:
            return sets[-1]
    return None


def one_execution_s(kind: str, payload: int, links: AxisLinks) -> float:
    """Seconds of one collective of `payload` bytes per device, as `planner.hlo` counts them."""
    if links.n == 1:
        return 0.0
    if kind == "all-gather":
        return links.all_gather_s(payload)
    if kind == "reduce-scatter":
        return links.reduce_scatter_s(payload)
    if kind == "all-reduce":
        return links.all_reduce_s(payload)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return links.all_to_all_s(payload * links.n)  # V is the array over the whole axis
    return links.permute_s(payload)


def collective_seconds(found: Sequence[Collective], mesh: MeshLinks) -> dict[Key, float]:
    """Seconds per (kind, axes), as written before XLA:CPU's rewrites, one after the other.

    Loops of unknown length are left out, as `summarize` leaves them out.
    """
    seconds: dict[Key, float] = {}
    for item in found:
        if item.axes == () or item.group_size == 1 or item.trips is None:
            continue
        links = mesh.links(item.axes, item.group_size)
        for kind in dict.fromkeys(part.kind for part in item.as_written):
            payload = sum(part.bytes for part in item.as_written if part.kind == kind)
            key = (kind, item.axes)
            once = one_execution_s(kind, payload, links)
            seconds[key] = seconds.get(key, 0.0) + item.trips * once
    return seconds
