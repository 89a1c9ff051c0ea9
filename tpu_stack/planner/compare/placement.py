"""Why a tensor is sharded as it is: the chain from logical axis through rule to mesh axis.

A spec alone does not say whether a dimension is whole because no rule splits it, because its mesh
axis has size 1, or because it has no logical axis at all. This does, one line per dimension.

    [link.text for link in chain(spec, get_profile("8t:4x4x4"))]
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Link:
    """One dimension's way to the mesh.

    Invariants: `shards` is the product of the mesh sizes, `per_device * shards == size`.

    Attributes:
      dim, size: the dimension and its elements. granule: elements that stay together.
      logical_axis: what the dimension means; None: never sharded.
      rule: the mesh axes that the profile's rules name for it; empty: there is no rule.
      mesh: size of each of these mesh axes. idle: those of size 1, which split nothing.
      shards: parts in all. per_device: elements of a part.
    """

    dim: int
    size: int
    granule: int
    logical_axis: str | None
    rule: tuple[str, ...]
    mesh: dict[str, int]
    idle: tuple[str, ...]
    shards: int
    per_device: int

    @property
    def text(self) -> str:
        """The chain on one line; a mesh axis of size 1 in brackets, as in the tables."""
        start = f"dimension {self.dim}, {self.size}: "
        if self.logical_axis is None:
            return start + "no logical axis -> whole"
        if not self.rule:
            return start + f"{self.logical_axis} -> no rule -> whole"
        sizes = [
            f"({axis}={size})" if axis in self.idle else f"{axis}={size}"
            for axis, size in self.mesh.items()
        ]
        found = f"{self.shards} x {self.per_device}" if self.shards > 1 else "whole"
        return start + f"{self.logical_axis} -> {' + '.join(sizes)} -> {found}"

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, the line for a person included."""
        return {
            **asdict(self), "rule": list(self.rule), "idle": list(self.idle), "text": self.text
        }  # fmt: skip


def chain(spec: TensorSpec, profile: Profile) -> list[Link]:
    """One Link per dimension of the tensor under the profile. Nothing is checked: see `check`."""
    links = []
    for dim, (size, axis) in enumerate(zip(spec.shape, spec.axes, strict=True)):
        rule = profile.rules.mesh_axes(axis)
        mesh = {name: profile.mesh[name] for name in rule}
        shards = prod(mesh.values())
        idle = tuple(name for name, count in mesh.items() if count == 1)
        links.append(
            Link(dim, size, spec.granules[dim], axis, rule, mesh, idle, shards, size // shards)
        )
    return links


def named(specs: Iterable[TensorSpec], name: str) -> TensorSpec:
    """The tensor called `name`. Raises UserError with the nearest name and how many there are."""
    known = {spec.name: spec for spec in specs}
    if name in known:
        return known[name]
    raise UserError(f"--why {name!r}: no such tensor; {_hint(name, list(known))}")


def _hint(name: str, known: Sequence[str]) -> str:
    """The nearest full name, or the one whose last parts are nearest, as "wq"."""
    tails = {".".join(full.split(".")[-n:]): full for full in known for n in (1, 2, 3)}
    near = difflib.get_close_matches(name, [*known, *tails], n=1, cutoff=0.4)
    listed = ", ".join(known)
    return f"perhaps {tails.get(near[0], near[0])!r}" if near else f"known: {listed}"
