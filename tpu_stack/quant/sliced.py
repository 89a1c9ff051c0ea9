"""The CPU's product with int8 weights: x in slices of eight bits, every product exact.

XLA:CPU multiplies int8 by int8 three to five times faster than float32 by float32, and four times
fewer bytes of weight come from memory. So a row of x is written as its largest magnitude times a
sum of int8 digits; one integer product takes all digits of all rows, and their results are added
with the digits' weights. Three digits of 254 levels reach 2**-23 of the row's largest magnitude,
which is what float32 holds; bfloat16, whose results are rounded at 2**-9, takes two, 2**-16.
Integer sums do not depend on their order: a row's result is the same, bit for bit, whatever rows
come with it. Ozaki et al. 2012 (doi:10.1007/s11075-011-9478-1); with integer units, Ootomo et al.
2024 (arXiv:2306.11975).

>>> y = sliced_matmul(x, q_int8, transpose=False, out_dtype=jnp.float32, mode="after")
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_stack.quant.qtensor import QTensor

DIGITS = {jnp.dtype(jnp.bfloat16): 2}
"""Digits of a value of x by its dtype; others take `MOST_DIGITS`."""
MOST_DIGITS = 3
LARGEST = 127.0
BASE = 2 * LARGEST
"""A digit leaves a remainder of at most a half, which is the next digit's 127 at this base."""
MAX_K = 2**31 // (127 * 128)
"""Terms that an int32 sum is sure to hold."""


def sliced_matmul(
    x: Float[Array, "*B K"], w: QTensor, transpose: bool, out_dtype: Any, mode: str
) -> Float[Array, "*B N"]:
    """`x @ w`, or `x @ w.T` when `transpose`, of a weight that `select` found sliceable: int8
    values, and scales that multiply the output. A row of x that is not finite gives no number."""
    assert mode == "after"
    *lead, k = x.shape
    count = DIGITS.get(x.dtype, MOST_DIGITS)
    x_MK = x.reshape(-1, k).astype(jnp.float32)
    digits, scale_M1 = slice_rows(x_MK, count)
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    y = jax.lax.dot_general(digits, w.values, dims, preferred_element_type=jnp.int32)
    y_DMN = y.astype(jnp.float32).reshape(count, x_MK.shape[0], -1)
    y_MN = y_DMN[-1]
    for digit in range(count - 2, -1, -1):  # the least first
        y_MN = y_DMN[digit] + y_MN * (1 / BASE)
    y_MN = y_MN * scale_M1 * w.full_scales().reshape(1, -1)
    return y_MN.astype(out_dtype).reshape(*lead, y_MN.shape[-1])


def slice_rows(
    x_MK: Float[Array, "M K"],
    count: int = MOST_DIGITS,
) -> tuple[Int[Array, "DM K"], Float[Array, "M 1"]]:
    """`count` digits of every value, int8, the first digits of all rows first; each row's scale.

    x = scale * (digit_0 + digit_1 / BASE + digit_2 / BASE**2 ...), up to half of the last's unit.
    """
    largest_M1 = jnp.max(jnp.abs(x_MK), axis=1, keepdims=True)
    scale_M1 = jnp.maximum(largest_M1, 1e-30) / LARGEST
    rest, digits = x_MK / scale_M1, []
    for _ in range(count):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * BASE
    return jnp.concatenate(digits), scale_M1
