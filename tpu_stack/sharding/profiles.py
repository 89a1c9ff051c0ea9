"""Profiles: chip + mesh axes + rules + precision, for training or for serving.

A profile string is `NAME[:TOPOLOGY]` and counts chips: `8t:4x4x4`, `8i:8`, `v6e:4x4`. 8t trains
and 8i serves unless a role is named; any chip can take either role. Without a topology the mesh is
free to be any size, which is what emulation on CPU devices uses.

>>> get_profile("8t:4x4x4").mesh
{'data': 1, 'fsdp': 64, 'tensor': 1}
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import log, prod
from typing import Literal

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import Chip, get_chip
from tpu_stack.hardware.topology import parse_topology
from tpu_stack.sharding.axes import (
    BATCH,
    EMBED,
    EXPERT,
    FFW,
    HEADS,
    KV_HEADS,
    VOCAB,
    TensorSpec,
)
from tpu_stack.sharding.mesh import mesh_text, parse_mesh
from tpu_stack.sharding.rules import Rules, check_divides

Role = Literal["train", "serve"]

_TENSOR = dict.fromkeys((FFW, HEADS, KV_HEADS, VOCAB), ("tensor",))
RULES: dict[str, Rules] = {
    "train": Rules({BATCH: ("data", "fsdp"), EMBED: ("fsdp",), **_TENSOR}),
    "serve": Rules({BATCH: ("data",), **_TENSOR}),
}
MESH_AXES: dict[str, tuple[str, ...]] = {
    "train": ("data", "fsdp", "tensor"),
    "serve": ("data", "tensor"),
}
EXPERT_AXIS = "expert"
"""A mesh axis of either role that a mesh has only where it is named, before its last axis. Experts
are split over it, and every token is on all of its devices: it is for mixtures of experts alone."""
DEFAULT_ROLE: dict[str, Role] = {"8t": "train", "8i": "serve"}


@dataclass(frozen=True)
class Precision:
    """dtype names. `params` is what the optimizer updates or, when serving, the unpacked rest."""

    params: str
    compute: str
    cache: str | None = None


PRECISION: dict[str, Precision] = {
    "train": Precision(params="float32", compute="bfloat16"),
    "serve": Precision(params="bfloat16", compute="bfloat16", cache="bfloat16"),
}


@dataclass(frozen=True)
class Profile:
    """How one program is laid out on one kind of chip.

    Invariants: `mesh` has exactly the axes of its role, in order, and `expert` before the last
    where it was named; its product is chips x devices per chip unless the profile is emulated.

    Attributes:
      name: the string it came from. chip: key of the chip facts. role: "train" or "serve".
      mesh: axis -> size, counting JAX devices.
      rules: logical axis -> mesh axes. precision: dtype policy.
      remat: what the backward pass recomputes ("full", "dots", "none"); training only.
      chips: chips the topology has, None when no topology was given.
      emulated: the mesh was shrunk onto CPU devices.
    """

    name: str
    chip: str
    role: Role
    mesh: Mapping[str, int]
    rules: Rules
    precision: Precision
    remat: str = "none"
    chips: int | None = None
    emulated: bool = False

    @property
    def devices(self) -> int:
        """JAX devices in the mesh."""
        return prod(self.mesh.values())

    @property
    def chip_facts(self) -> Chip:
        """The facts of this profile's chip."""
        return get_chip(self.chip)

    def with_mesh(self, text: str) -> "Profile":
        """This profile with the axis sizes of `text` (`"fsdp=16,tensor=4"`).

        Raises UserError when the profile has a topology and the sizes do not multiply to it.
        """
        sizes = parse_profile_mesh(self.role, text)
        if self.chips is not None and prod(sizes.values()) != self.devices:
            raise UserError(
                f"mesh {text!r} has {prod(sizes.values())} devices,"
                f" and {self.name} has {self.devices}"
            )
        return dataclasses.replace(self, mesh=sizes, rules=rules_of(self.role, sizes))

    def check(self, specs: Iterable[TensorSpec]) -> None:
        """Raises UserError at the first tensor that the mesh does not divide evenly."""
        for spec in specs:
            check_divides(spec, self.rules, self.mesh)

    def fit(self, specs: Iterable[TensorSpec]) -> "Profile":
        """The legal mesh with as many devices that is nearest to this one for these tensors.

        Raises UserError, naming the tensor that does not divide, when there is none.
        """
        specs = tuple(specs)
        for sizes in _nearest_meshes(self.mesh, self.devices):
            candidate = dataclasses.replace(self, mesh=sizes)
            try:
                candidate.check(specs)
            except UserError:
                continue
            return candidate
        self.check(specs)
        raise AssertionError("unreachable: the profile's own mesh is among the candidates")

    def emulate(self, n: int, *, emulated: bool = True) -> "Profile":
        """The same axes and rules on a mesh of `n` devices, CPU ones unless `emulated` is off.

        Without a topology the axes share n as evenly as they can; with one, each axis shrinks by
        about the same factor, and axes of size 1 stay 1.
        """
        if n < 1:
            raise UserError(f"cannot emulate on {n} devices; at least 1 is needed")
        if self.chips is None:
            even = round(n ** (1 / len(self.mesh)), 6)
            ideal: dict[str, float] = {}
            ideal.update((axis, even) for axis in self.mesh)
        else:
            shrink = log(n) / log(self.devices) if self.devices > 1 else 1.0
            ideal = {axis: size**shrink for axis, size in self.mesh.items()}
        sizes = next(iter(_nearest_meshes(ideal, n)))
        return dataclasses.replace(self, mesh=sizes, emulated=emulated)


def parse_profile_mesh(role: Role, text: str) -> dict[str, int]:
    """Sizes of the axes of a role's mesh; `expert` is among them only where `text` names it."""
    *first, last = MESH_AXES[role]
    sizes = parse_mesh(text, (*first, EXPERT_AXIS, last))
    if not any(part.startswith(f"{EXPERT_AXIS}=") for part in text.split(",")):
        del sizes[EXPERT_AXIS]
    return sizes


def rules_of(role: Role, mesh: Mapping[str, int]) -> Rules:
    """A role's rules on this mesh: with an axis for experts where it has one."""
    if EXPERT_AXIS not in mesh:
        return RULES[role]
    return Rules({**RULES[role].table, EXPERT: (EXPERT_AXIS,)})


def _nearest_meshes(ideal: Mapping[str, float], n: int) -> list[dict[str, int]]:
    """Every mesh of n devices with these axes, the nearest to `ideal` (in log size) first.

    Ties go to the larger last axis, then to the larger last but one.
    """
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    shapes = [
        (*head, n // prod(head))
        for head in product(divisors, repeat=len(ideal) - 1)
        if n % prod(head) == 0
    ]

    def distance(shape: tuple[int, ...]):
        gap = sum(
            (log(size) - log(want)) ** 2 for size, want in zip(shape, ideal.values(), strict=True)
        )
        return (round(gap, 9), tuple(-size for size in reversed(shape)))

    return [dict(zip(ideal, shape, strict=True)) for shape in sorted(shapes, key=distance)]


def get_profile(text: str, role: Role | None = None) -> Profile:
    """The profile that `text` names, in its chip's usual role or the one given.

    The default mesh of a training topology is pure fsdp, as the published recipes use; that of a
    serving topology is pure tensor parallelism. Raises UserError for an unknown chip, a topology
    it cannot have, or a chip that has no usual role when none is given.
    """
    name, _, topology = text.partition(":")
    chip = get_chip(name)
    role = role or DEFAULT_ROLE.get(name, "train")
    sizes = dict.fromkeys(MESH_AXES[role], 1)
    chips = None
    if topology:
        chips = parse_topology(topology, chip).chips
        sizes["fsdp" if role == "train" else "tensor"] = chip.devices(chips)
    remat = "full" if role == "train" else "none"
    return Profile(text, name, role, sizes, RULES[role], PRECISION[role], remat, chips)


def require_batch_divides(profile: Profile, batch: int) -> None:
    """Raises UserError when `batch` rows cannot be split over the batch axes of the mesh."""
    axes = profile.rules.mesh_axes(BATCH)
    shards = prod(profile.mesh[axis] for axis in axes)
    if batch % shards:
        used = {axis: profile.mesh[axis] for axis in axes}
        raise UserError(
            f"batch size {batch} does not divide over {mesh_text(used)} ({shards} shards);"
            f" nearest that works: {max(1, round(batch / shards)) * shards}"
        )
