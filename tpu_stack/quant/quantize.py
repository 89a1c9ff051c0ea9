"""Turning a weight into a `QTensor`, with the scale of each group chosen by squared error.

Method: for each group, scales around full scale (the format's `scale_search`) are tried and the
one with the least squared error is kept: a grid search, as in the MSE clipping of Banner et al.
2019 (arXiv:1810.05723, section 3), but on the data rather than on a fitted density. For int4 the
scale may be negative: two's complement has one integer more below zero than above, so the group's
largest magnitude, whichever its sign, is given -8 (llama.cpp's Q4_0 does the same). On Gaussian
weights in groups of 32 that is 21.8 dB, against 21.3 dB with positive scales.

>>> q = quantize(w, "int4", name="layers.mlp.up")  # w [..., K, N]
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import Format, get_format
from tpu_stack.quant.qtensor import QTensor, scales_shape

CANDIDATES = 16
"""Scales tried per group and sign. 32 would gain 0.02 dB."""


def quantize(
    w: Float[Array, "*L K N"] | np.ndarray,
    format: str | Format,
    contract_axis: int = -2,
    *,
    name: str = "weight",
) -> QTensor:
    """Quantizes `w` to `format`.

    Args:
      w: floating weight [..., K, N] when contract_axis is -2; an embedding table [..., V, D] when
        it is -1 (one scale per row). May be traced or abstract (`jax.eval_shape`).
      format: a quantized format, by name or value.
      contract_axis: the axis that the matrix product sums over, -2 or -1.
      name: the tensor's name, for error messages.

    Returns: a QTensor of `w`'s shape. A group of zeros gets scale 1 and zeros, exactly; a group of
      one repeated value is kept to within half a unit in the scale's last place; ties round to the
      even integer; a group too small for its scale dtype becomes zeros.

    Raises: UserError, naming the tensor, for an unquantized format, a non-float `w`, NaN or
      infinity (checked only when `w` is concrete), a K that the group does not divide, or a
      grouped format for rows.
    """
    fmt = get_format(format) if isinstance(format, str) else format
    if not fmt.quantized:
        raise UserError(f"{name}: {fmt.name} is not a quantized format; cast with astype instead")
    if contract_axis not in (-1, -2):
        raise UserError(f"{name}: contract_axis must be -2 or -1, not {contract_axis}")
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise UserError(f"{name}: needs a float matrix, got {w.dtype} {list(w.shape)}")
    shape = scales_shape(tuple(w.shape), fmt, contract_axis, name)
    _check_finite(w, name)
    return _quantize(jnp.asarray(w), fmt, contract_axis, shape)


def _check_finite(w, name: str) -> None:
    if isinstance(w, Tracer):
        return
    finite = jnp.isfinite(jnp.asarray(w))
    if not bool(finite.all()):
        first = np.unravel_index(int(jnp.argmin(finite)), w.shape)
        count = int((~finite).sum())
        raise UserError(
            f"{name}: {count} of {w.size} weights are NaN or infinite, the first at "
            f"{[int(i) for i in first]}"
        )


@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(w: Array, fmt: Format, contract_axis: int, shape: tuple[int, ...]) -> QTensor:
    w32 = w.astype(jnp.float32)
    if contract_axis == -1:
        axis, grouped = -1, w32
    else:
        *lead, k, n = w.shape
        axis, grouped = -2, w32.reshape(*lead, shape[-3], k // max(shape[-3], 1), n)
    scales = _search_scales(grouped, fmt, axis)
    values = _round(grouped, scales, fmt).reshape(w.shape).astype(fmt.dtype)
    return QTensor(values, scales.reshape(shape), fmt.name, contract_axis)


def _round(grouped: Array, scales: Array, fmt: Format) -> Array:
    return jnp.clip(jnp.round(grouped / scales.astype(jnp.float32)), fmt.qmin, fmt.qmax)


def _search_scales(grouped: Array, fmt: Format, axis: int) -> Array:
    """The scale of least squared error per group; `axis` is reduced and kept with size 1."""
    high = grouped.max(axis, keepdims=True)
    low = grouped.min(axis, keepdims=True)
    largest = jnp.maximum(high, -low)
    full = largest / abs(fmt.scale_anchor)
    if fmt.scale_anchor < 0:  # the largest magnitude maps to qmin: the scale takes its sign
        full = jnp.where(high > -low, -full, full)
        signs = np.array([1.0, -1.0])
    else:
        signs = np.array([1.0])
    shrinks = np.array([1.0, *np.linspace(*fmt.scale_search, CANDIDATES)])
    factors = (signs[:, None] * shrinks).reshape(-1).astype(np.float32)  # 1 first: it wins ties
    safe = jnp.where(largest > 0, largest, 1.0)  # errors are relative, so that none overflows

    def scale_of(factor: Array) -> Array:
        scale = (full * factor).astype(fmt.scale_dtype)
        usable = jnp.isfinite(scale) & (jnp.abs(scale) >= jnp.finfo(scale.dtype).tiny)
        return jnp.where(usable, scale, jnp.ones_like(scale))

    def consider(best, factor):
        best_error, best_scale = best
        scale = scale_of(factor)
        kept = _round(grouped, scale, fmt) * scale.astype(jnp.float32)
        error = jnp.square((grouped - kept) / safe).sum(axis, keepdims=True)
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, scale, best_scale)), None

    start = (jnp.full(full.shape, jnp.inf, jnp.float32), jnp.ones(full.shape, fmt.scale_dtype))
    (_, scales), _ = jax.lax.scan(consider, start, factors)
    return scales
