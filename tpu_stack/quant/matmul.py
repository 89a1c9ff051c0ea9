"""The one matrix product that models call, for every storage of the weight and on any mesh.

The dtype of `x` is the compute dtype, accumulation is float32, and a quantized weight is frozen:
gradients reach `x` only. Which implementation runs is decided in `select.py`. GSPMD partitions the
products of plain weights, and of packed ones that XLA multiplies. It does not split a
`pallas_call`: there each device runs the kernel on its shard of the weight (`sharded_matmul`).

>>> y = matmul(x, q_int4)  # x [M, K]; array or QTensor [K, N]
>>> logits = matmul(x, jnp.ones((64, 256)), transpose=True, out_dtype=jnp.float32)  # table [V, D]
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tpu_stack.errors import UserError
from tpu_stack.kernels.quantized_matmul import quantized_matmul
from tpu_stack.quant.array_product import array_product
from tpu_stack.quant.blocked import blocked_matmul
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.rotation import rotate
from tpu_stack.quant.select import Choice, choose, kernel_per_device
from tpu_stack.quant.shard_specs import (
    axis_names,
    batch_axes,
    check_divides,
    padded_spec,
    weight_specs,
)
from tpu_stack.quant.sliced import sliced_matmul
from tpu_stack.quant.transposed import Transposed
from tpu_stack.sharding.constrain import current_scope


def matmul(
    x: Float[Array, "*B K"],
    w: Array | QTensor | Transposed,
    axes: tuple[str, str] | None = None,
    *,
    transpose: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """`x @ w`, or `x @ w.T` when `transpose`.

    Args:
      x: activations [..., K], a float dtype; also the dtype that the weight is cast to. With `axes`
        the first of at least two axes is the batch.
      w: [K, N], an array, a QTensor or a Transposed; [N, K] when `transpose`, as an embedding table
        [V, D].
      axes: the logical axes of `w`. On a mesh of several devices where the kernel runs, each
        multiplies by its shard, and a sharded contraction is summed. None leaves `w` whole.
      transpose: contract with the last axis of `w`.
      out_dtype: dtype of the result; `x.dtype` when None. Rounded once from float32.
      implementation: one of `select.IMPLEMENTATIONS`; None takes `use_implementation`'s, else the
        default (see `explain`). Plain arrays use `jnp.dot`, or on a CPU `multiply_reduce`.

    Returns: [..., N].

    Raises: UserError for shapes that do not fit, a weight that breaks QTensor's invariants, or an
      implementation that cannot run here.
    """
    if isinstance(w, Transposed):
        w, transpose = w.stored, not transpose
    assert not isinstance(w, Transposed)  # of a transposed weight there is none
    _check_shapes(x, w, transpose)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if not isinstance(w, QTensor):
        w = w.astype(x.dtype)
        fused = choose(x.shape, w, transpose).implementation == "multiply_reduce"
        return array_product(x, w, transpose, out_dtype, fused)
    scope = current_scope()
    if axes and scope and scope[0].size > 1 and kernel_per_device():
        mesh, rules = scope
        w_spec = rules.partition_spec(axes, "a weight")
        middle = (None,) * (x.ndim - 2)
        x_spec = PartitionSpec(
            batch_axes(x.shape[0], mesh, rules), *middle, w_spec[1 if transpose else 0]
        )
        how: Any = {"transpose": transpose, "out_dtype": out_dtype, "implementation": "pallas"}
        return sharded_matmul(x, w, mesh, x_spec, w_spec, **how)
    choice = choose(x.shape, w, transpose, implementation)
    with jax.named_scope(f"quant.{choice.implementation}.{w.format}"):
        if not w.rotation:
            return _quantized(x, w, transpose, out_dtype, choice)
        return _rotated(x, w, transpose, out_dtype, choice)


def _check_shapes(x: Any, w: Any, transpose: bool) -> None:
    if len(w.shape) != 2:
        raise UserError(f"matmul needs a weight of two axes, got {list(w.shape)}")
    contract = w.shape[-1 if transpose else 0]
    if x.ndim < 1 or x.shape[-1] != contract:
        raise UserError(
            f"matmul: x {list(x.shape)} does not fit weight {list(w.shape)} "
            f"with transpose={transpose}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"matmul: x must be floating, got {x.dtype}")
    if isinstance(w, QTensor):
        w.check("matmul weight")


def _rotated(x: Array, w: QTensor, transpose: bool, out_dtype: Any, choice: Choice) -> Array:
    """The product with a rotated weight: rotating x, or the result, undoes the rotation of K."""
    plain = replace(w, rotation=0)
    if not transpose:
        return _quantized(rotate(x, w.rotation, -1), plain, transpose, out_dtype, choice)
    y = _quantized(x, plain, transpose, jnp.dtype(jnp.float32), choice)
    return rotate(y, w.rotation, -1).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _quantized(x: Array, w: QTensor, transpose: bool, out_dtype: Any, choice: Choice) -> Array:
    how = (transpose, out_dtype, choice.scale_mode)
    if choice.implementation != "pallas":
        run = _XLA[choice.implementation]
        if run is _xla or choice.requested:
            return run(x, w, *how)
        # Lowered for another platform from a CPU process (ahead of time), the default is "xla".
        return jax.lax.platform_dependent(
            x, w, cpu=lambda x, w: run(x, w, *how), default=lambda x, w: _xla(x, w, *how)
        )
    try:
        y_MN = quantized_matmul(
            x.reshape(-1, x.shape[-1]),
            w.values,
            w.scales,
            tensor_scale=w.tensor_scale,
            offset=w.offset,
            transpose=transpose,
            rows=w.shape[0] if w.packed_bits and transpose else None,
            scale_mode=choice.scale_mode,
            out_dtype=out_dtype,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"the pallas matmul cannot run this: {error}") from error
    return y_MN.reshape(*x.shape[:-1], y_MN.shape[-1])


def _quantized_fwd(x, w, transpose, out_dtype, choice):
    empty = jnp.zeros((0,), x.dtype)  # carries x's dtype: residuals must be arrays
    return _quantized(x, w, transpose, out_dtype, choice), (w, empty)


def _quantized_bwd(transpose, out_dtype, choice, residuals, g):
    """dx = g @ w.T by the same family of implementation; the weight is frozen, its gradient 0."""
    w, like_x = residuals
    family = "pallas" if choice.implementation == "pallas" else "xla"
    dx = matmul(g.astype(like_x.dtype), w, transpose=not transpose, implementation=family)
    return dx, None


_quantized.defvjp(_quantized_fwd, _quantized_bwd)


def _channel_scales(w: QTensor, rank: int) -> Array:
    """Per-channel scales [..., N] for weights and [..., V] for tables, float32, of `rank` axes."""
    return w.full_scales().reshape(*[1] * (rank - 1), -1)


def _xla(x: Array, w: QTensor, transpose: bool, out_dtype: Any, mode: str) -> Array:
    if mode == "before":
        return array_product(x, w.dequantize(x.dtype), transpose).astype(out_dtype)
    if mode == "input":
        x = (x * _channel_scales(w, x.ndim)).astype(x.dtype)
    y = array_product(x, w.grid(x.dtype), transpose)
    return (y * _channel_scales(w, y.ndim) if mode == "after" else y).astype(out_dtype)


_XLA = {"xla": _xla, "xla_blocked": blocked_matmul, "xla_sliced": sliced_matmul}


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
    x_parts, w_parts = padded_spec(x_spec, x.ndim), padded_spec(w_spec, 2)
    k_axis = 1 if transpose else 0
    contract, output = w_parts[k_axis], w_parts[1 - k_axis]
    if axis_names(x_parts[-1]) != axis_names(contract):
        raise UserError(
            f"sharded_matmul: x splits the contraction over {x_parts[-1]} and the weight over "
            f"{contract}; they must agree"
        )
    check_divides(x.shape, x_parts, mesh, "x")
    check_divides(w.shape, w_parts, mesh, "weight")
    w_specs = weight_specs(w, PartitionSpec(*w_parts), mesh)
    local_dtype = jnp.float32 if axis_names(contract) else out_dtype
    result_dtype = jnp.dtype(out_dtype or x.dtype)
    local = partial(
        matmul, transpose=transpose, out_dtype=local_dtype, implementation=implementation
    )

    def body(x: Array, w: Array | QTensor) -> Array:
        y = local(x, w)
        if axis_names(contract):
            y = jax.lax.psum(y, axis_names(contract))
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
