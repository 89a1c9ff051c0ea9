"""The products of a model's activations with its weights, on the current mesh.

GSPMD partitions the products of plain weights, and of packed ones that XLA multiplies. It does not
split a `pallas_call`: there each device runs the kernel on its shard of the weight, and a sharded
contraction is summed.

    q_BTF = project(x_BTD, self.wq.get_value(), (EMBED, HEADS))
"""

from math import prod
from typing import Any

from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from tpu_stack.quant.matmul import matmul
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.select import kernel_per_device
from tpu_stack.quant.sharded import sharded_matmul
from tpu_stack.quant.transposed import Transposed
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import current_scope
from tpu_stack.sharding.rules import Rules


def project(
    x: Float[Array, "B *T K"],
    w: Array | QTensor | Transposed,
    axes: tuple[str, str],
    *,
    transpose: bool = False,
    out_dtype: Any = None,
) -> Float[Array, "B *T N"]:
    """`matmul(x, w, ...)`, of a weight whose two axes are the logical `axes`.

    Raises UserError as `matmul` and `sharded_matmul` do.
    """
    scope = current_scope()
    if scope is None or scope[0].size == 1 or not isinstance(w, QTensor) or not kernel_per_device():
        return matmul(x, w, transpose=transpose, out_dtype=out_dtype)
    mesh, rules = scope
    w_spec = rules.partition_spec(axes, "a weight")
    contract = w_spec[1 if transpose else 0]
    x_spec = PartitionSpec(rows_spec(x.shape[0], mesh, rules), *(None,) * (x.ndim - 2), contract)
    return sharded_matmul(
        x,
        w,
        mesh,
        x_spec,
        w_spec,
        transpose=transpose,
        out_dtype=out_dtype,
        implementation="pallas",
    )


def rows_spec(rows: int, mesh: Mesh, rules: Rules) -> tuple[str, ...] | None:
    """The mesh axes that shard a batch of `rows`; None when they do not divide it, as at prefill:
    then every device has all rows."""
    axes = rules.mesh_axes(BATCH)
    shards = prod(mesh.shape[axis] for axis in axes)
    return axes if shards > 1 and rows % shards == 0 else None
