"""A weight kept the other way round, [N, K], for a CPU to multiply by.

A product of few rows is bound by reading the weight, and XLA:CPU reads it fastest along the
contraction: from [K, N] it packs blocks of the weight anew for every product. On two cores, K, N =
1024, 3072, 8 rows of float32: 1.8 weights a ns from [K, N], 4.2 from [N, K] by `summed_products`;
24 rows of int8: 3.7 and 5.7; 8 rows of bfloat16: 2.5 and 3.8; of fp8 widened to it, 3.9 ms and 2.7
(`experiments/LOG.md`).

>>> y = matmul(x, turn(w))  # the same numbers, up to the order of sums
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tpu_stack.quant.qtensor import QTensor

SUMMED_ROWS = range(3, 49)
"""Rows of x for which the sum of products is the faster. XLA:CPU computes it the same, bit for bit,
from 3 rows to 16; dot_general of [N, K], from 2 to 1024."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turned:
    """A weight [K, N] as `table`: [N, K], an array or a QTensor with a scale for each of N."""

    table: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, [K, N]."""
        return (*self.table.shape[:-2], *reversed(self.table.shape[-2:]))

    @property
    def ndim(self) -> int:
        return self.table.ndim


def turn(weight: Any) -> Any:
    """`weight` [K, N] turned; one with scales by group, packed bits or a rotation as it is, and one
    that is turned already."""
    if isinstance(weight, Turned):
        return weight
    if not isinstance(weight, QTensor):
        return Turned(weight.T)
    if weight.spec.group or weight.packed_bits or weight.rotation:
        return weight
    table = replace(weight, values=weight.values.T, scales=weight.scales[0].T, contract_axis=-1)
    return Turned(table.check())


def summed_products(x_MK: Float[Array, "M K"], w_NK: Float[Array, "N K"]) -> Float[Array, "M N"]:
    """`x @ w.T`, written so that XLA:CPU multiplies and sums in one pass over `w`.

    The barrier keeps what made `x` out of that pass, which would compute it N times, and two
    products of one `x` from sharing, and so writing out, its broadcast to [M, N, K].
    """
    x_MK, w_NK = jax.lax.optimization_barrier((x_MK, w_NK))
    return jnp.sum(w_NK[None] * x_MK[:, None, :], axis=2)
