"""Where packed weights live: shapes and shardings of every leaf under a serving profile.

Example:
    layout = PackedLayout.of(config, "int4", profile, mesh)
    layout.abstract["blocks"]["mlp"]["w_up"].values.sharding
"""

from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import WORD_ROWS
from tpu_stack.quant.policy import stored_format, stored_rotation
from tpu_stack.quant.qtensor import QTensor, abstract_qtensor, values_shape
from tpu_stack.quant.tpu_layout import tpu_layout
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class PackedLayout:
    """The parameter tree with QTensors or arrays of ShapeDtypeStructs that carry shardings, on TPU
    with the order of axes in memory (`quant.tpu_layout`)."""

    config: ModelConfig
    format: str
    abstract: dict[str, Any]

    @classmethod
    def of(
        cls, config: ModelConfig, format: str, profile: Profile, mesh: Mesh, rotation: int = 0
    ) -> "PackedLayout":
        """`rotation` as in `pack`.

        Raises UserError when a tensor, or the groups of its scales, do not divide the mesh.
        """
        profile.check(tensor_specs(config))

        def placed(spec: TensorSpec) -> Any:
            return _placed(spec, format, profile, mesh, rotation)

        return cls(config, format, map_specs(config, placed))

    @property
    def shardings(self) -> dict[str, Any]:
        """The sharding of every leaf."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def _placed(spec: TensorSpec, format: str, profile: Profile, mesh: Mesh, rotation: int) -> Any:
    """One tensor as it is stored and sharded."""
    fmt = stored_format(spec, format)
    values = profile.rules.partition_spec(spec.axes, spec.name)
    if not fmt.quantized:
        return jax.ShapeDtypeStruct(spec.shape, fmt.dtype, sharding=NamedSharding(mesh, values))
    block = stored_rotation(spec, format, rotation)
    axis = spec.contract_axis or -2
    packed = abstract_qtensor(spec.shape, fmt.name, axis, block, spec.name).check(spec.name)
    specs = {"values": values, "scales": scales_spec(spec, packed, profile)}
    if packed.tensor_scale is not None:
        specs["tensor_scale"] = PartitionSpec(*_entries(spec, profile)[:-2], None, None, None)

    def struct(part: str, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        leaf = getattr(packed, part)
        place: Any = tpu_layout(NamedSharding(mesh, where), part, axis, len(leaf.shape))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return replace(packed, **{part: struct(part, where) for part, where in specs.items()})


def _entries(spec: TensorSpec, profile: Profile) -> list[Any]:
    """The mesh axes of every axis of a tensor."""
    entries = list(profile.rules.partition_spec(spec.axes, spec.name))
    return entries + [None] * (len(spec.shape) - len(entries))


def scales_spec(spec: TensorSpec, packed: QTensor, profile: Profile) -> PartitionSpec:
    """How the scales of `packed` are sharded: with the values, where they have as many parts.

    Raises UserError when the contraction axis is split finer than its groups, the words of packed
    bits or the blocks of a rotation.
    """
    entries = _entries(spec, profile)
    if packed.contract_axis == -1:
        return PartitionSpec(*entries[:-1], None)
    *lead, k, n = entries
    groups = packed.scales.shape[-3]
    shards = prod(profile.mesh[axis] for axis in profile.rules.mesh_axes(spec.axes[-2]))
    words = WORD_ROWS if packed.packed_bits else 1
    for unit, what in ((words, "words of bits"), (packed.rotation or 1, "rotated rows")):
        if shards > 1 and spec.shape[-2] % (unit * shards):
            raise UserError(
                f"{spec.name}: {spec.shape[-2]} rows along {spec.axes[-2]!r} do not divide over"
                f" {shards} devices in blocks of {unit}, as {what} need; split that axis less"
            )
    if groups == 1:
        return PartitionSpec(*lead, None, None, n)
    if groups % shards:
        raise UserError(
            f"{spec.name}: {groups} groups of {packed.group} along {spec.axes[-2]!r} do not divide"
            f" over {shards} devices"
        )
    return PartitionSpec(*lead, k, None, n)


def with_groups(config: ModelConfig, format: str) -> tuple[TensorSpec, ...]:
    """The tensors, with the groups of `format` as units that a mesh must not cut.

    What `Profile.fit` needs to find a serving mesh whose scales divide too.
    """
    found = []
    for spec in tensor_specs(config):
        group = stored_format(spec, format).granule
        if group is not None and spec.contract_axis is not None:
            granules = list(spec.granules)
            granules[spec.contract_axis] = lcm(granules[spec.contract_axis], group)
            spec = replace(spec, granules=tuple(granules))
        found.append(spec)
    return tuple(found)


def packed_bytes_per_device(spec: TensorSpec, format: str, profile: Profile) -> tuple[str, int]:
    """(stored format, bytes on one device) of a tensor as a TPU stores it, scales included."""
    fmt = stored_format(spec, format)
    shape = _shard(spec.shape, profile.rules.partition_spec(spec.axes, spec.name), profile)
    if not fmt.quantized:
        return fmt.name, prod(shape) * fmt.bits // 8
    packed = abstract_qtensor(spec.shape, fmt.name, spec.contract_axis or -2, name=spec.name)
    scales = _shard(packed.scales.shape, scales_spec(spec, packed, profile), profile)
    shard = replace(
        packed,
        values=jax.ShapeDtypeStruct(values_shape(shape, fmt), packed.values.dtype),
        scales=jax.ShapeDtypeStruct(scales, packed.scales.dtype),
    )
    return fmt.name, shard.nbytes_packed


def bytes_per_device(config: ModelConfig, format: str, profile: Profile) -> int:
    """Packed bytes of all weights on one device."""
    return sum(packed_bytes_per_device(spec, format, profile)[1] for spec in tensor_specs(config))


def _shard(shape: tuple[int, ...], spec: PartitionSpec, profile: Profile) -> tuple[int, ...]:
    """The part of `shape` that one device holds under `spec`."""
    parts = []
    for size, entry in zip(shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        parts.append(size // prod(profile.mesh[axis] for axis in axes))
    return tuple(parts)
