"""How long a collective takes on one mesh axis: bandwidth or hops, whichever binds.

The ring formulas are the scaling-book's (jax-ml/scaling-book, "Sharded Matrices and How to
Multiply Them"). Over a ring, an all-gather of V bytes in total takes V / W, where W is the
bandwidth of a link's two directions together; an all-reduce takes twice that, an all-to-all a
quarter, and no collective takes less than its hops times about a microsecond. This module adds what
the book leaves out: the exact (n - 1) / n share that moves, axes without a wraparound link
("line"), and networks that are not rings (Boardfly), where the bandwidth of a chip is assumed to
bind ("direct").

V is always the bytes of the whole array over the axis: after an all-gather, before a
reduce-scatter.

>>> AxisLinks(n=8, bytes_per_s_one_way=45e9, kind="ring").all_gather_s(33.6e6)
0.000326...
"""

from dataclasses import dataclass
from typing import Literal

from tpu_stack.hardware.chips import Chip

HOP_S = 1e-6  # scaling-book: "typically around 1us" per hop


@dataclass(frozen=True)
class AxisLinks:
    """One mesh axis: `n` members and the links between them.

    kind: "ring" (neighbours, wrapping round), "line" (neighbours, ends open) or "direct" (any
    member to any other, bound by what a member can send). `bytes_per_s_one_way` is one link's for
    ring and line, a member's total for direct. `max_hops` is the diameter of a direct network.
    Raises ValueError unless n >= 1, bytes_per_s_one_way > 0, hop_s >= 0 and max_hops >= 1.
    """

    n: int
    bytes_per_s_one_way: float
    kind: Literal["ring", "line", "direct"] = "ring"
    max_hops: int = 1
    hop_s: float = HOP_S

    def __post_init__(self):
        if self.n < 1 or self.bytes_per_s_one_way <= 0 or self.hop_s < 0 or self.max_hops < 1:
            raise ValueError(f"not an axis: {self}")

    @property
    def hops(self) -> int:
        """Hops between the two members farthest apart."""
        if self.n == 1:
            return 0
        return {"ring": self.n // 2, "line": self.n - 1, "direct": self.max_hops}[self.kind]

    def _at_least_hops(self, seconds: float, hops: int) -> float:
        return max(seconds, hops * self.hop_s)

    def all_gather_s(self, total_bytes: float) -> float:
        """Seconds until every member has V: V (n-1)/n over two directions on a ring, else one."""
        directions = 2 if self.kind == "ring" else 1
        moved = total_bytes * (self.n - 1) / self.n
        return self._at_least_hops(moved / (directions * self.bytes_per_s_one_way), self.hops)

    def reduce_scatter_s(self, total_bytes: float) -> float:
        """The all-gather run backwards, at the same cost (the additions are not counted)."""
        return self.all_gather_s(total_bytes)

    def all_reduce_s(self, total_bytes: float) -> float:
        """A reduce-scatter, then an all-gather."""
        return 2 * self.all_gather_s(total_bytes)

    def all_to_all_s(self, total_bytes: float) -> float:
        """Each of n members sends V/n^2 to each other.

        ring: V floor(n^2/4)/n^2 / (2 one-way), which is V / (4 W) for even n; line: the middle
        link carries V floor(n^2/4)/n^2 each way; direct: a member sends V (n-1)/n^2.
        """
        if self.kind == "direct":
            moved = total_bytes * (self.n - 1) / self.n**2
        else:
            moved = total_bytes * (self.n**2 // 4) / self.n**2
        directions = 2 if self.kind == "ring" else 1
        return self._at_least_hops(moved / (directions * self.bytes_per_s_one_way), self.hops)

    def permute_s(self, shard_bytes: float) -> float:
        """Every member sends its shard to the next: shard / one-way.

        On a line the end's shard goes back over every link the other way, so it costs n - 1 hops.
        """
        if self.n == 1:
            return 0.0
        hops = {"ring": 1, "line": self.n - 1, "direct": self.max_hops}[self.kind]
        return self._at_least_hops(shard_bytes / self.bytes_per_s_one_way, hops)


def axis_links(
    chip: Chip, devices: int, *, ring: bool, whole_chips: bool | None = None
) -> AxisLinks:
    """The links of a mesh axis of `devices` neighbouring JAX devices, from the chip's facts.

    A torus axis has one link per direction; on Boardfly a member has all links of its chip.

    Args:
      ring: whether the torus axes under this mesh axis wrap round (`hardware.slices.wraps`);
        ignored on Boardfly.
      whole_chips: on 7x and 8i two devices share a chip's links. True: both lie on this axis, so
        the members are chips, and what the two exchange is free (no figure for it is published).
        False: they lie on different axes, whose two collectives get half of the links each. None:
        True where `devices` fills whole chips.
    Raises UserError where the bandwidth is not known (cpu), ValueError where `whole_chips` is True
    and `devices` does not fill whole chips.
    """
    per_chip = chip.devices(1)
    if whole_chips is None:
        whole_chips = devices % per_chip == 0
    elif whole_chips and devices % per_chip:
        raise ValueError(f"{devices} devices do not fill chips of {per_chip}")
    members, sharers = (devices // per_chip, 1) if whole_chips else (devices, per_chip)
    if chip.torus_rank:
        kind = "ring" if ring else "line"
        return AxisLinks(members, chip.require("ici_link_bytes_per_s_one_way") / sharers, kind)
    rate = chip.ici_bytes_per_s_one_way / sharers
    return AxisLinks(members, rate, "direct", max_hops=int(chip.require("ici_max_hops")))
