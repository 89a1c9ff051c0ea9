"""How long a program's collectives take over a chip's links, given where its mesh axes lie.

A mesh axis lies on the torus axes whose sizes multiply to its own, the last mesh axis on the last
of them, and uses one link per direction of each (scaling-book: an all-gather over k axes is k times
as fast). An axis that fits no set of torus axes is taken to use one link. Devices of one chip are
neighbours on the last mesh axis that has an even size.

>>> seconds = collective_seconds(found, MeshLinks(get_chip("8t"), (4, 4, 4), profile.mesh))
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.collectives import HOP_S, AxisLinks, axis_links, axis_wraps
from tpu_stack.planner.hlo import Collective

Key = tuple[str, tuple[str, ...] | None]


def cubic_topology(chip: Chip, chips: int) -> tuple[int, ...]:
    """The torus of `chips` chips that is nearest to a cube (square); one axis off the torus."""
    divisors = [d for d in range(1, chips + 1) if chips % d == 0]
    shapes = [
        (*head, chips // prod(head))
        for head in product(divisors, repeat=(chip.torus_rank or 1) - 1)
        if chips % prod(head) == 0
    ]
    return min((tuple(sorted(shape)) for shape in shapes), key=lambda shape: (sum(shape), shape))


@dataclass(frozen=True)
class MeshLinks:
    """A mesh of JAX devices on a chip's topology. `topology` counts chips along each torus axis.

    `hop_s` is the least time of a hop; at 0, bandwidth alone counts.
    """

    chip: Chip
    topology: tuple[int, ...]
    mesh: Mapping[str, int]
    hop_s: float = HOP_S

    @property
    def chips(self) -> int:
        """Chips the mesh fills. Raises UserError when its devices do not fill whole chips."""
        devices, per_chip = prod(self.mesh.values()), self.chip.devices(1)
        if devices % per_chip:
            raise UserError(f"{devices} devices do not fill {self.chip.name} chips of {per_chip}")
        return devices // per_chip

    def _chip_axis(self) -> str | None:
        """The mesh axis along which the devices of one chip are neighbours."""
        if self.chip.devices(1) == 1:
            return None
        even = [axis for axis, size in self.mesh.items() if size % self.chip.devices(1) == 0]
        return even[-1] if even else None

    def _torus_axes(self) -> dict[str, tuple[int, ...]]:
        """Torus axis sizes that each mesh axis lies on; axes that fit none are left out."""
        left, found = list(self.topology), {}
        for axis in reversed(tuple(self.mesh)):
            size = self.mesh[axis]
            size //= self.chip.devices(1) if axis == self._chip_axis() else 1
            if size == 1:
                found[axis] = ()
            for count in range(1, len(left) + 1):
                sets = [c for c in combinations(left, count) if prod(c) == size and 1 not in c]
                if sets:
                    found[axis] = sets[-1]
                    for used in sets[-1]:
                        left.remove(used)
                    break
        return found

    def links(self, axes: Sequence[str] | None, group_size: int) -> AxisLinks:
        """The links between the members of a collective over these mesh axes (None: unmatched)."""
        if axes is None:
            return self._bounded(axis_links(self.chip, group_size))
        devices = prod(self.mesh[axis] for axis in axes)
        whole = self._chip_axis() in axes if self.chip.devices(1) > 1 else None
        plain = self._bounded(axis_links(self.chip, devices, whole_chips=whole))
        torus = self._torus_axes()
        spanned = [axis for axis in axes if self.mesh[axis] > 1]
        if plain.kind == "direct" or not spanned or any(axis not in torus for axis in spanned):
            return plain
        sizes = [size for axis in spanned for size in torus[axis]]
        wraps = all(axis_wraps(self.chip, size) for size in sizes)
        together = dataclasses.replace(
            plain,
            kind="ring" if wraps else "line",
            bytes_per_s_one_way=plain.bytes_per_s_one_way * max(1, len(sizes)),
        )
        return self._within(together, sizes)

    def _bounded(self, links: AxisLinks) -> AxisLinks:
        """No two members are more hops apart than the diameter of the slice, or than n - 1."""
        if links.kind == "direct":
            hops = max(1, min(links.max_hops, links.n - 1))
            return dataclasses.replace(links, max_hops=hops, hop_s=self.hop_s)
        return self._within(links, self.topology)

    def _within(self, links: AxisLinks, sizes: Sequence[int]) -> AxisLinks:
        """The same links, charged at most the hops across torus axes of these sizes."""
        across = sum(size // 2 if axis_wraps(self.chip, size) else size - 1 for size in sizes)
        share = min(1.0, across / links.hops) if links.hops else 1.0
        return dataclasses.replace(links, hop_s=self.hop_s * share)


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
