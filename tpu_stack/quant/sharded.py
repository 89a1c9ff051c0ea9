"""The quantized matmul on a mesh, one kernel call per device.

GSPMD does not partition a `pallas_call`, so `shard_map` splits the operands by the given specs,
each device multiplies its own shards, and a sharded contraction is summed with `psum` in float32.

>>> y = sharded_matmul(x, w, mesh, P("data", "tensor"), P("tensor", None))
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import WORD_ROWS
from tpu_stack.quant.matmul import matmul
from tpu_stack.quant.qtensor import QTensor


def sharded_matmul(
    x: Float[Array, "*B K"],
    w: Array | QTensor,
    mesh: Mesh | AbstractMesh,
    x_spec: PartitionSpec,
    w_spec: PartitionSpec,
    *,
    transpose: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """`matmul(x, w, ...)` with `x` and `w` sharded over `mesh` as given.

    Args:
      x_spec: spec of x [..., K].
      w_spec: spec of the weight's two axes, [K, N] (or [N, K] when `transpose`); the scales follow.
      The rest as in `matmul`.

    Returns: [..., N], sharded as x's leading axes and w's output axis.

    Raises: UserError when the two specs disagree on the contraction, when sizes do not divide, or
      when a shard would cut through a scale group.
    """
    x_parts, w_parts = _padded(x_spec, x.ndim), _padded(w_spec, 2)
    k_axis = 1 if transpose else 0
    contract, output = w_parts[k_axis], w_parts[1 - k_axis]
    if _names(x_parts[-1]) != _names(contract):
        raise UserError(
            f"sharded_matmul: x splits the contraction over {x_parts[-1]} and the weight over "
            f"{contract}; they must agree"
        )
    _check_divides(x.shape, x_parts, mesh, "x")
    _check_divides(w.shape, w_parts, mesh, "weight")
    w_specs = weight_specs(w, PartitionSpec(*w_parts), mesh)
    local_dtype = jnp.float32 if _names(contract) else out_dtype
    result_dtype = jnp.dtype(out_dtype or x.dtype)
    local = partial(
        matmul, transpose=transpose, out_dtype=local_dtype, implementation=implementation
    )

    def body(x: Array, w: Array | QTensor) -> Array:
        y = local(x, w)
        if _names(contract):
            y = jax.lax.psum(y, _names(contract))
        return y.astype(result_dtype)

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(*x_parts), w_specs),
        out_specs=PartitionSpec(*x_parts[:-1], output),
        check_vma=False,  # a pallas_call does not say over which axes its result varies
    )(*_placed((x, w), (PartitionSpec(*x_parts), w_specs), mesh))


def _placed(operands: Any, specs: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Moves operands to `specs` where the mesh makes shardings part of types; else `shard_map`."""
    if AxisType.Explicit not in mesh.axis_types:
        return operands
    return jax.tree.map(
        lambda leaf, spec: jax.reshard(leaf, NamedSharding(mesh, spec)), operands, specs
    )


def weight_specs(w: Array | QTensor, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> Any:
    """Specs for `w`'s leaves from the spec of its logical shape, leading axes included.

    A QTensor's scales are split with the values wherever they have an entry per value or group,
    and replicated along an axis they span. Raises UserError when a shard would cut a group.
    """
    if not isinstance(w, QTensor):
        return spec
    parts = _padded(spec, w.ndim)
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


def _padded(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    if len(spec) > ndim:
        raise UserError(f"spec {spec} has more axes than the array's {ndim}")
    return (*spec, *(None,) * (ndim - len(spec)))


def _names(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return tuple(part) if isinstance(part, (tuple, list)) else (part,)


def _shards(part: Any, mesh: Mesh | AbstractMesh) -> int:
    count = 1
    for name in _names(part):
        if name not in mesh.shape:
            raise UserError(f"mesh has no axis {name!r}; it has {list(mesh.shape)}")
        count *= mesh.shape[name]
    return count


def _check_divides(shape: Any, parts: tuple[Any, ...], mesh: Mesh | AbstractMesh, what: str):
    for axis, (size, part) in enumerate(zip(shape, parts, strict=True)):
        shards = _shards(part, mesh)
        if size % shards:
            raise UserError(
                f"sharded_matmul: {what} axis {axis} of {list(shape)} does not divide over "
                f"{shards} devices ({part})"
            )
