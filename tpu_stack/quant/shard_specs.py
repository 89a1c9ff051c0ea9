"""How the operands of a product are split over a mesh, and where a split would cut a weight.

>>> specs = weight_specs(q_int4, P("tensor", None), mesh)
"""

from dataclasses import replace
from math import prod
from typing import Any

from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import WORD_ROWS
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.rules import Rules


def weight_specs(w: Array | QTensor, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """Specs for `w`'s leaves from the spec of its logical shape, leading axes included.

    A QTensor's scales are split with the values wherever they have an entry per value or group,
    and replicated along an axis they span. Raises UserError when a shard would cut a group.
    """
    if not isinstance(w, QTensor):
        return spec
    parts = padded_spec(spec, w.ndim)
    *lead, rows, columns = parts
    if w.contract_axis == -1:
        scales = PartitionSpec(*lead, rows, None)
    else:
        _check_groups(w, rows, mesh)
        split = rows if w.scales.shape[-3] > 1 else None
        scales = PartitionSpec(*lead, split, None, columns)
    level = None if w.tensor_scale is None else PartitionSpec(*lead, None, None, None)
    return replace(w, values=PartitionSpec(*parts), scales=scales, tensor_scale=level)


def _check_groups(w: QTensor, rows: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError when `rows`, the split of K, cuts a group, a word or a rotated block."""
    shards, groups = _shards(rows, mesh), w.scales.shape[-3]
    if groups > 1 and groups % shards:
        raise UserError(
            f"{w.format} weight {list(w.shape)}: {groups} groups of {w.group} along K cannot be "
            f"split over {shards} devices ({rows})"
        )
    words = WORD_ROWS if w.packed_bits else 1
    for unit, what in ((words, "words of one-bit values"), (w.rotation or 1, "rotated blocks")):
        if shards > 1 and w.shape[-2] % (unit * shards):
            raise UserError(
                f"{w.format} weight {list(w.shape)}: {what} are {unit} rows of K, which cannot be "
                f"split over {shards} devices ({rows})"
            )


def padded_spec(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    """`spec` with an entry for each of `ndim` axes. Raises UserError when it has more."""
    if len(spec) > ndim:
        raise UserError(f"spec {spec} has more axes than the array's {ndim}")
    return (*spec, *(None,) * (ndim - len(spec)))


def axis_names(part: Any) -> tuple[str, ...]:
    """The mesh axes in one entry of a spec."""
    if part is None:
        return ()
    return tuple(part) if isinstance(part, (tuple, list)) else (part,)


def _shards(part: Any, mesh: Mesh | AbstractMesh) -> int:
    count = 1
    for name in axis_names(part):
        if name not in mesh.shape:
            raise UserError(f"mesh has no axis {name!r}; it has {list(mesh.shape)}")
        count *= mesh.shape[name]
    return count


def check_divides(shape: Any, parts: tuple[Any, ...], mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raises UserError, naming the operand, when `mesh` does not divide `shape` as `parts` say."""
    for axis, (size, part) in enumerate(zip(shape, parts, strict=True)):
        shards = _shards(part, mesh)
        if size % shards:
            raise UserError(
                f"sharded_matmul: {what} axis {axis} of {list(shape)} does not divide over "
                f"{shards} devices ({part})"
            )


def batch_axes(rows: int, mesh: Mesh, rules: Rules) -> tuple[str, ...] | None:
    """The mesh axes that shard a batch of `rows`; None when they do not divide it, as at prefill:
    then every device has all rows."""
    axes = rules.mesh_axes(BATCH)
    shards = prod(mesh.shape[axis] for axis in axes)
    return axes if shards > 1 and rows % shards == 0 else None
