"""The product with a plain array, and its gradients.

>>> y = array_product(x, jnp.ones((256, 64)), False, jnp.bfloat16)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tpu_stack.quant.transposed import multiply_reduce


def array_product(
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
