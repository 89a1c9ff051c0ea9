"""How many chips, in how many slices, on which mesh axes: and the links each axis has.

The shape of a slice is taken to be the torus nearest to a cube (square), and an axis of n of its
c chips to lie on a log(n) / log(c) share of the torus's axes, at least one: exact where the axis
fills whole torus axes, and near enough to rank meshes where it does not.

>>> Layout(get_chip("v5p"), 512, fsdp=64, tensor=8).links("fsdp").kind
'ring'
"""

from dataclasses import dataclass
from functools import cached_property
from math import log, prod

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip
from tpu_stack.hardware.collectives import HOP_S, AxisLinks
from tpu_stack.hardware.slices import wraps

AXES = ("data", "fsdp", "context", "expert", "tensor")


@dataclass(frozen=True)
class Layout:
    """A mesh on `chips` chips in `slices` equal slices.

    Sizes count JAX devices, within one slice; slices are data parallel over the data-center
    network, or share the weights across it where `dcn_fsdp`. Invariant: the sizes multiply to the
    devices of a slice. Raises UserError otherwise.
    """

    chip: Chip
    chips: int
    slices: int = 1
    data: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    dcn_fsdp: bool = False

    def __post_init__(self):
        if min(self.chips, self.slices, *self.sizes.values()) < 1:
            raise UserError(f"every size of a mesh is at least 1: {self.text}")
        devices, filled = self.chip.devices(self.chips), self.slices * prod(self.sizes.values())
        if devices != filled:
            raise UserError(
                f"mesh {self.text} on {self.slices} slice(s) has {filled} devices; "
                f"{self.chips} {self.chip.name} chips have {devices}"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> devices, within a slice."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def text(self) -> str:
        """As in "fsdp=64,tensor=8"; "one device" where every axis is 1."""
        return ",".join(f"{k}={v}" for k, v in self.sizes.items() if v != 1) or "one device"

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chip.devices(self.chips)

    @cached_property
    def _chip_axis(self) -> str | None:
        """The axis along which the devices of a chip are neighbours: the last of an even size."""
        per_chip = self.chip.devices(1)
        even = [axis for axis in AXES if getattr(self, axis) % per_chip == 0]
        return even[-1] if per_chip > 1 and even else None

    def links(self, axis: str) -> AxisLinks:
        """The links between the chips along one axis of a slice."""
        members = getattr(self, axis)
        if axis == self._chip_axis:
            members //= self.chip.devices(1)
        return _links(self.chip, self.chips // self.slices, members)

    @property
    def dcn_bytes_per_s(self) -> float:
        """A chip's share of its host's network, one way; v5p's where no source gives the chip's."""
        fact = self.chip.dcn_bytes_per_s
        return float(fact.number) if fact else 50e9 / 8


def _links(chip: Chip, chips: int, members: int) -> AxisLinks:
    rank = chip.torus_rank
    if members <= 1:
        return AxisLinks(1, 1.0)
    if rank is None:
        hops = max(1, min(int(chip.require("ici_max_hops")), members - 1))
        return AxisLinks(members, chip.ici_bytes_per_s_one_way, "direct", max_hops=hops)
    torus_axes = max(1.0, rank * log(members) / log(chips))
    side = round(members ** (1 / torus_axes))
    kind = "ring" if all(wraps(chip, (side,) * rank)) else "line"
    rate = chip.require("ici_link_bytes_per_s_one_way") * torus_axes
    links = AxisLinks(members, rate, kind)
    across = torus_axes * (side // 2 if kind == "ring" else side - 1)
    hop_s = HOP_S * min(1.0, max(1.0, across) / links.hops)
    return AxisLinks(members, rate, kind, hop_s=hop_s)
