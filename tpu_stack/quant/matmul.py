"""The one matrix product that models call, for every storage of the weight.

The dtype of `x` is the compute dtype, accumulation is float32, and a quantized weight is frozen:
gradients reach `x` only. Which implementation runs is decided in `select.py`.

>>> y = matmul(x, q_int4)  # x [M, K]; array or QTensor [K, N]
>>> logits = matmul(x, jnp.ones((64, 256)), transpose=True, out_dtype=jnp.float32)  # table [V, D]
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.errors import UserError
from tpu_stack.kernels.quantized_matmul import quantized_matmul
from tpu_stack.quant.blocked import blocked_matmul
from tpu_stack.quant.formats import WORD_ROWS
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.quant.rotation import rotate
from tpu_stack.quant.select import Choice, choose
from tpu_stack.quant.sliced import sliced_matmul
from tpu_stack.quant.transposed import Transposed, multiply_reduce


def matmul(
    x: Float[Array, "*B K"],
    w: Array | QTensor | Transposed,
    *,
    transpose: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> Float[Array, "*B N"]:
    """`x @ w`, or `x @ w.T` when `transpose`.

    Args:
      x: activations [..., K], a float dtype; also the dtype that the weight is cast to.
      w: [K, N], an array, a QTensor or a Transposed; [N, K] when `transpose`, as an embedding table
        [V, D].
      transpose: contract with the last axis of `w`.
      out_dtype: dtype of the result; `x.dtype` when None. Rounded once from float32.
      implementation: one of `select.IMPLEMENTATIONS`; None takes `use_implementation`'s, else the
        default (see `explain`). Plain arrays use `jnp.dot`, or on a CPU `multiply_reduce`.

    Returns: [..., N].

    Raises: UserError for shapes that do not fit, a weight that breaks QTensor's invariants, or an
      implementation that cannot run here.
    """
    if isinstance(w, Transposed):
        return matmul(
            x, w.stored, transpose=not transpose, out_dtype=out_dtype, implementation=implementation
        )
    _check_shapes(x, w, transpose)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if not isinstance(w, QTensor):
        w = w.astype(x.dtype)
        implementation = choose(x.shape, w, transpose).implementation
        return _dot(x, w, transpose, out_dtype, implementation == "multiply_reduce")
    choice = choose(x.shape, w, transpose, implementation)
    with jax.named_scope(f"quant.{choice.implementation}.{w.format}"):
        if not w.rotation:
            return _quantized(x, w, transpose, out_dtype, choice)
        return _rotated(x, w, transpose, out_dtype, choice)


def take(w: Array | QTensor, ids: Int[Array, "*B"], dtype: Any = None) -> Float[Array, "*B D"]:
    """Rows `ids` of `w` [V, D]: the embedding lookup, for an array or a QTensor.

    Returns: [..., D] in `dtype`; when None, the array's dtype, or bfloat16 for a QTensor. A row
      outside the table is NaN rather than a neighbour; negative ids count from the end.
    """
    if not isinstance(w, QTensor):
        return jnp.take(w, ids, axis=0, mode="fill").astype(dtype or w.dtype)
    if w.rotation:
        raise UserError("take: rows of a rotated weight are mixed with their neighbours")
    rows = w.shape[0]
    ids = jnp.where(ids < 0, ids + rows, ids)
    scales = w.full_scales()
    if w.contract_axis == -2:
        scales, group = scales[:, 0], ids // w.group
    else:
        group = ids
    picked = _rows_of(w, ids) * jnp.take(scales, group, axis=0, mode="clip")
    inside = ((ids >= 0) & (ids < rows))[..., None]
    return jnp.where(inside, picked, jnp.nan).astype(dtype or jnp.bfloat16)


def _rows_of(w: QTensor, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Grid values of the rows `ids`, float32; any row's for ids outside."""
    if not w.packed_bits:
        return jnp.take(w.values, ids, axis=0, mode="clip").astype(jnp.float32) + w.offset
    words = jnp.take(w.values, 8 * (ids // WORD_ROWS) + ids % 8, axis=0, mode="clip")
    bit = ids % WORD_ROWS // 8
    return 2.0 * ((words >> bit[..., None]) & 1).astype(jnp.float32) - 1.0


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


def _dot(
    x: Array, w: Array, transpose: bool, out_dtype: Any = jnp.float32, fused: bool = False
) -> Array:
    """The product, rounded once from float32 to `out_dtype`.

    A plain weight's product is computed in `out_dtype` itself: a float32 product, cast afterwards,
    would make the backward matmuls and the tensor-parallel sums float32 too, at twice the bytes.
    """
    return _product(x, w, transpose, jnp.dtype(out_dtype), fused)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: Array, w: Array, transpose: bool, out_dtype: Any, fused: bool) -> Array:
    dims = (((x.ndim - 1,), (1 if transpose else 0,)), ((), ()))
    dot = partial(jax.lax.dot_general, dimension_numbers=dims, preferred_element_type=out_dtype)
    if not fused:
        return dot(x, w)

    def one_pass(x: Array, w: Array) -> Array:
        y_MN = multiply_reduce(x.reshape(-1, x.shape[-1]), w)
        return y_MN.astype(out_dtype).reshape(*x.shape[:-1], -1)

    # lowered for another platform from a CPU process (ahead of time), it is a dot
    return jax.lax.platform_dependent(x, w, cpu=one_pass, default=dot)


def _product_fwd(x, w, transpose, out_dtype, fused):
    return _product(x, w, transpose, out_dtype, fused), (x, w)


def _product_bwd(transpose, out_dtype, fused, residuals, g):
    """Both gradients as products of matrices; the weight's comes out as the weight is stored.

    Autodiff derives for `x` [B, T, K] a product [N, K] and its transpose. XLA:CPU copies an
    operand for that, and computes again what produced it.
    """
    x, w = residuals
    g_MN, x_MK = (y.reshape(-1, y.shape[-1]) for y in (g, x))
    dx = _dot_dims(g_MN, w, (1, 0 if transpose else 1), x.dtype)
    left, right = (g_MN, x_MK) if transpose else (x_MK, g_MN)
    return dx.reshape(x.shape), _dot_dims(left, right, (0, 0), w.dtype)


def _dot_dims(a: Array, b: Array, contract: tuple[int, int], dtype: Any) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


_product.defvjp(_product_fwd, _product_bwd)


def _rotated(x: Array, w: QTensor, transpose: bool, out_dtype: Any, choice: Choice) -> Array:
    """The product with a rotated weight: rotating x, or the result, undoes the rotation of K."""
    plain = replace(w, rotation=0)
    if not transpose:
        return _quantized(rotate(x, w.rotation, -1), plain, transpose, out_dtype, choice)
    y = _quantized(x, plain, transpose, jnp.dtype(jnp.float32), choice)
    return rotate(y, w.rotation, -1).astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _quantized(x: Array, w: QTensor, transpose: bool, out_dtype: Any, choice: Choice) -> Array:
    run = _RUN[choice.implementation]
    if choice.implementation in ("xla_blocked", "xla_sliced") and not choice.requested:
        # Lowered for another platform from a CPU process (ahead of time), the default is "xla".
        args = (transpose, out_dtype, choice.scale_mode)
        return jax.lax.platform_dependent(
            x, w, cpu=lambda x, w: run(x, w, *args), default=lambda x, w: _xla(x, w, *args)
        )
    return run(x, w, transpose, out_dtype, choice.scale_mode)


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
        return _dot(x, w.dequantize(x.dtype), transpose).astype(out_dtype)
    if mode == "input":
        x = (x * _channel_scales(w, x.ndim)).astype(x.dtype)
    y = _dot(x, w.grid(x.dtype), transpose)
    return (y * _channel_scales(w, y.ndim) if mode == "after" else y).astype(out_dtype)


def _pallas(x: Array, w: QTensor, transpose: bool, out_dtype: Any, mode: str) -> Array:
    *lead, k = x.shape
    x_MK = x.reshape(-1, k)
    try:
        y_MN = quantized_matmul(
            x_MK,
            w.values,
            w.scales,
            tensor_scale=w.tensor_scale,
            offset=w.offset,
            transpose=transpose,
            rows=w.shape[0] if w.packed_bits and transpose else None,
            scale_mode=mode,
            out_dtype=out_dtype,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"the pallas matmul cannot run this: {error}") from error
    return y_MN.reshape(*lead, y_MN.shape[-1])


_RUN = {
    "xla": _xla,
    "xla_blocked": blocked_matmul,
    "xla_sliced": sliced_matmul,
    "pallas": _pallas,
}
