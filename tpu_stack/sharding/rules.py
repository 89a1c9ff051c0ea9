"""Rules: from logical axes to mesh axes, with every illegal combination refused by name.

>>> rules = Rules({"embed": ("fsdp",), "ffw": ("tensor",)})
>>> rules.partition_spec(("embed", "ffw"))
P('fsdp', 'tensor')
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod

from jax.sharding import PartitionSpec

from tpu_stack.errors import UserError
from tpu_stack.sharding.axes import LOGICAL_AXES, TensorSpec


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes, most significant first. Axes without an entry are replicated."""

    table: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for axis, mesh_axes in self.table.items():
            if axis not in LOGICAL_AXES:
                raise UserError(f"rule for {axis!r}: no such logical axis; one of {LOGICAL_AXES}")
            if len(set(mesh_axes)) != len(mesh_axes):
                raise UserError(f"rule for {axis!r} names a mesh axis twice: {mesh_axes}")

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that `axis` is split over; empty when replicated."""
        return self.table.get(axis, ()) if axis is not None else ()

    def partition_spec(self, axes: tuple[str | None, ...], name: str = "tensor") -> PartitionSpec:
        """The spec of a tensor with these logical axes.

        Raises UserError when two of its logical axes land on one mesh axis.
        """
        owner: dict[str, str | None] = {}
        entries: list[str | tuple[str, ...] | None] = []
        for axis in axes:
            mesh_axes = self.mesh_axes(axis)
            for mesh_axis in mesh_axes:
                if mesh_axis in owner:
                    raise UserError(
                        f"{name}: logical axes {owner[mesh_axis]!r} and {axis!r} both map to mesh"
                        f" axis {mesh_axis!r}; a tensor can use a mesh axis once"
                    )
                owner[mesh_axis] = axis
            entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
        return PartitionSpec(*entries)


def split_limit(spec: TensorSpec, dim: int) -> int:
    """The most shards of dimension `dim` that cut no granule."""
    return spec.shape[dim] // spec.granules[dim]


def check_divides(spec: TensorSpec, rules: Rules, mesh: Mapping[str, int]) -> None:
    """Raises UserError naming tensor, axis and sizes when `mesh` does not divide `spec` evenly.

    The message ends in the nearest sizes of the mesh axes at fault that do divide it.
    """
    rules.partition_spec(spec.axes, spec.name)
    for dim, axis in enumerate(spec.axes):
        mesh_axes = rules.mesh_axes(axis)
        shards = prod(mesh.get(name, 1) for name in mesh_axes)
        limit = split_limit(spec, dim)
        if limit % shards:
            unit = f" (in units of {spec.granules[dim]})" if spec.granules[dim] > 1 else ""
            sizes = ", ".join(f"{name}={mesh.get(name, 1)}" for name in mesh_axes)
            raise UserError(
                f"{spec.name}: axis {axis!r} has {limit} parts{unit},"
                f" which {sizes} does not divide;"
                f" nearest that works: {_nearest(mesh_axes, mesh, limit)}"
            )


def _nearest(mesh_axes: tuple[str, ...], mesh: Mapping[str, int], limit: int) -> str:
    """Sizes for `mesh_axes`, each at most what it is now, whose product divides `limit`."""
    found = []
    for name in mesh_axes:
        size = gcd(mesh.get(name, 1), limit)
        limit //= size
        found.append(f"{name}={size}")
    return ", ".join(found)
