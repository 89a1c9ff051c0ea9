"""Every tensor under both profiles: specs, bytes per device, and what must move between them.

Arithmetic over shapes and specs alone: no device is used and nothing is allocated.

    row = tensor_rows(config, get_profile("8t:4x4x4"), get_profile("8i:8"), "int4")[0]
    row.train_spec, row.state_bytes, row.serve_format, row.serve_bytes
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.layout import packed_bytes_per_device
from tpu_stack.sharding.axes import BATCH, TensorSpec
from tpu_stack.sharding.profiles import Profile
from tpu_stack.training.config import OptimizerConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.optimizer import make_optimizer

MASTER_DTYPE = "float32"
RESHARD_DEFINITION = (
    "bytes that a serving device must receive: its part of the tensor under the serving spec, in"
    " the float32 that it is restored in, less what it already holds under the training spec where"
    " both profiles are the same chips (same chip and device count, device i being device i of"
    " both); the total is over all serving devices"
)


@dataclass(frozen=True)
class TensorRow:
    """One tensor on both sides. Bytes are per JAX device unless the name says total.

    Attributes:
      spec: name, shape, logical axes.
      train_spec, serve_spec: mesh axes per dimension.
      train_elements: elements one training device keeps. gathered_elements: elements of it once
        gathered over the batch axes (fsdp), which is what a matmul reads.
      master_bytes: float32 weights. state_bytes: these and the optimizer's moments.
      serve_format: what it is stored as. serve_bytes: packed, scales included.
      reshard_bytes: the most one serving device must receive; see RESHARD_DEFINITION.
      reshard_total_bytes: the same over all serving devices.
    """

    spec: TensorSpec
    train_spec: PartitionSpec
    serve_spec: PartitionSpec
    train_elements: int
    gathered_elements: int
    master_bytes: int
    state_bytes: int
    serve_format: str
    serve_bytes: int
    reshard_bytes: int
    reshard_total_bytes: int


def abstract_mesh(profile: Profile) -> AbstractMesh:
    """The profile's mesh without devices, of any size."""
    axes = tuple(profile.mesh)
    return AbstractMesh(tuple(profile.mesh.values()), axes, axis_types=(AxisType.Auto,) * len(axes))


def shard_count(profile: Profile, axis: str | None) -> int:
    """How many parts the mesh splits a logical axis into."""
    return prod(profile.mesh[name] for name in profile.rules.mesh_axes(axis))


def tensor_rows(
    config: ModelConfig, train: Profile, serve: Profile, format: str
) -> list[TensorRow]:
    """One row per tensor, stacked layers together, in the order of the parameter tree.

    Raises UserError when a tensor, or the groups of its scales, do not divide either mesh.
    """
    optimizer = make_optimizer(OptimizerConfig(), 1, config)
    layout: Any = StateLayout.of(config, optimizer, train, abstract_mesh(train))  # pyright: ignore
    serve.check(tensor_specs(config))
    master = _bytes_by_name(layout.abstract.params)
    moments = _bytes_by_name(layout.abstract.opt_state)
    return [
        _row(spec, train, serve, master[spec.name], moments.get(spec.name, 0), format)
        for spec in tensor_specs(config)
    ]


def _row(
    spec: TensorSpec, train: Profile, serve: Profile, master: int, moments: int, format: str
) -> TensorRow:
    train_spec = train.rules.partition_spec(spec.axes, spec.name)
    serve_spec = serve.rules.partition_spec(spec.axes, spec.name)
    batch_axes = train.rules.mesh_axes(BATCH)
    split = [name for axis in spec.axes for name in train.rules.mesh_axes(axis)]
    kept = prod(train.mesh[name] for name in split if name not in batch_axes)
    per_device, total = reshard_bytes(spec.shape, train, train_spec, serve, serve_spec)
    serve_format, serve_bytes = packed_bytes_per_device(spec, format, serve)
    return TensorRow(
        spec=spec,
        train_spec=train_spec,
        serve_spec=serve_spec,
        train_elements=spec.size // prod(train.mesh[name] for name in split),
        gathered_elements=spec.size // kept,
        master_bytes=master,
        state_bytes=master + moments,
        serve_format=serve_format,
        serve_bytes=serve_bytes,
        reshard_bytes=per_device,
        reshard_total_bytes=total,
    )


def _bytes_by_name(tree: Any) -> dict[str, int]:
    """Bytes per device of every parameter's leaves in a tree that repeats the parameter tree.

    Leaves outside any parameter tree (a step counter) are left out.
    """
    found: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        if leaf.ndim:
            name = ".".join(keys)
            local = prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            found[name] = found.get(name, 0) + local
    return found


def reshard_bytes(
    shape: tuple[int, ...],
    train: Profile,
    train_spec: PartitionSpec,
    serve: Profile,
    serve_spec: PartitionSpec,
) -> tuple[int, int]:
    """(most for one serving device, over all of them), as RESHARD_DEFINITION says."""
    needed = _intervals(shape, serve_spec, serve.mesh)
    sizes = np.prod([high - low for low, high in needed], axis=0, dtype=np.int64)
    if (train.chip, train.devices) == (serve.chip, serve.devices):
        held = _intervals(shape, train_spec, train.mesh)
        shared = [
            np.maximum(0, np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]))
            for a, b in zip(needed, held, strict=True)
        ]
        sizes = sizes - np.prod(shared, axis=0, dtype=np.int64)
    itemsize = np.dtype(MASTER_DTYPE).itemsize
    return itemsize * int(sizes.max()), itemsize * int(sizes.sum())


def _intervals(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: Mapping[str, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every dimension, where each device's part of it begins and ends."""
    sizes = tuple(mesh.values())
    places = np.unravel_index(np.arange(prod(sizes)), sizes)
    place = dict(zip(mesh, places, strict=True))
    found = []
    for size, entry in zip(shape, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        index, parts = np.zeros(prod(sizes), np.int64), 1
        for name in names:
            index, parts = index * mesh[name] + place[name], parts * mesh[name]
        found.append((index * (size // parts), (index + 1) * (size // parts)))
    return found
