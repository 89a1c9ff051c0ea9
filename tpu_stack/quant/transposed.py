"""A weight stored transposed, [N, K], for products on one CPU device.

A product of few rows is bound by reading the weight, and XLA:CPU reads it fastest along the
contraction: from [K, N] it packs blocks of the weight anew for every product. On two cores, K, N =
1024, 3072, 8 rows of float32: 1.8 weights a ns from [K, N], 4.2 from [N, K] by `multiply_reduce`;
24 rows of int8: 3.7 and 5.7; 8 rows of bfloat16: 2.5 and 3.8; of fp8 widened to it, 3.9 ms and 2.7
(`experiments/LOG.md`).

>>> from tpu_stack.quant import matmul
>>> y = matmul(x, transpose_weight(w))  # the same numbers, up to the order of sums
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.quant.qtensor import QTensor

MULTIPLY_REDUCE_ROWS = range(3, 49)
"""Rows of x for which `multiply_reduce` is faster than dot_general. XLA:CPU computes a row of it
the same, bit for bit, from 3 rows to 16; a row of dot_general with [N, K], from 2 to 1024."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transposed:
    """A weight [K, N], stored as `stored` [N, K]: an array, or a QTensor with one scale per row."""

    stored: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, [K, N]."""
        return (*self.stored.shape[:-2], *reversed(self.stored.shape[-2:]))

    @property
    def ndim(self) -> int:
        return self.stored.ndim


def transpose_weight(weight: Any) -> Any:
    """`weight` [K, N] stored transposed.

    A weight that is transposed already is returned as it is, and so is a QTensor with groups,
    packed bits or a rotation, which have no transposed form.
    """
    if isinstance(weight, Transposed):
        return weight
    if not isinstance(weight, QTensor):
        return Transposed(weight.T)
    if weight.spec.group or weight.packed_bits or weight.rotation:
        return weight
    stored = replace(weight, values=weight.values.T, scales=weight.scales[0].T, contract_axis=-1)
    return Transposed(stored.check())


def multiply_reduce(x_MK: Float[Array, "M K"], w_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """`x @ w.T`, written so that XLA:CPU multiplies and sums in one pass over `w`.

    The barrier keeps the computation of `x` out of that pass, which would repeat it N times. It
    also keeps two products of one `x` from sharing, and so writing out, its broadcast to [M, N, K].
    """
    x_MK, w_NK = jax.lax.optimization_barrier((x_MK, w_NK))
    return jnp.sum(w_NK[None] * x_MK[:, None, :], axis=2)
