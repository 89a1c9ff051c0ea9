"""Other implementations of the product, which the bench compiles beside the kernel.

XLA's own programs, JAX's Pallas matmul for bfloat16, and qwix, which is optional. A peer that does
not take a format raises with the reason, which the bench prints as its row.

>>> peer = make_peer("xla", "int8", "int8", (16, 64, 128))
>>> jax.eval_shape(peer.function, *peer.operands).shape
(16, 128)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.matmul import matmul as jax_matmul
from jaxtyping import Array, Float

from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands

BFLOAT16 = "bf16"
"""The "format" of weights that are not quantized, which only peers multiply."""
PEERS = {
    "xla": "XLA: widen and scale the weight in bfloat16, then a dot; for bf16 the dot alone",
    "jax": "jax.experimental.pallas.ops.tpu.matmul on bfloat16",
    "qwix_dot": "qwix.dot_general on a QArray, compiled by XLA",
    "qwix": "qwix.contrib.kernels.quantized_matmul, its Pallas kernel",
}
XLA_PEERS = ("xla", "qwix_dot")
"""Peers that are not Pallas kernels."""
QWIX_BLOCKS = (256, 512, 1024)
"""M, K, N: the default of qwix's QuantizedMatmulConfig, from its sweep on v5."""
JAX_BLOCKS = (512, 1024, 1024)


@dataclass(frozen=True)
class Peer:
    """One peer's program.

    Attributes:
      function, operands: the function to compile and its abstract arguments.
      steps: grid steps of a Pallas kernel; None for XLA's programs.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    steps: int | None = None


def make_peer(peer: str, name: str, activation: str, shape: tuple[int, ...]) -> Peer:
    """The program of one of `PEERS` for a format, or for `BFLOAT16`, at M, K, N.

    Raises: ValueError where the peer does not take the format, the activation or the shape;
      ModuleNotFoundError where it is not installed.
    """
    if name == BFLOAT16:
        return _bfloat16(peer, shape)
    if peer == "xla":
        operands = abstract_operands(FORMATS[name], activation, *shape)
        return Peer(partial(_dequantize_then_dot, FORMATS[name].offset), operands)
    if peer == "qwix_dot":
        return _qwix_dot(name, activation, shape)
    if peer == "qwix":
        return _qwix_kernel(name, activation, shape)
    raise ValueError(f"{PEERS[peer]}: takes only {BFLOAT16}, not {name}")


def _bfloat16(peer: str, shape: tuple[int, ...]) -> Peer:
    m, k, n = shape
    operands = (_array((m, k), "bfloat16"), _array((k, n), "bfloat16"))
    if peer == "xla":
        return Peer(_dot, operands)
    if peer != "jax":
        raise ValueError(f"{PEERS[peer]}: takes only quantized weights")
    bm, bk, bn = (min(block, size) for block, size in zip(JAX_BLOCKS, shape, strict=True))
    if m % bm or k % bk or n % bn:
        raise ValueError(f"jax's matmul takes multiples of its blocks {bm, bk, bn}, not {shape}")
    function = partial(jax_matmul, block_shape=(bm, bn), block_k=bk)
    return Peer(function, operands, math.prod((m // bm, n // bn, k // bk)))


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _dot(x: Array, w: Array) -> Float[Array, "M N"]:
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def _dequantize_then_dot(
    offset: float, x: Array, values: Array, scales: Array, keywords: dict[str, Array]
) -> Float[Array, "M N"]:
    """Casts quantized x to bfloat16 too and applies its scales to the result."""
    k, n = x.shape[1], values.shape[1]
    if values.dtype == jnp.int32:
        tiles = values.reshape(-1, 1, 8, n) >> jnp.arange(32).reshape(1, 32, 1, 1)
        values = (2 * (tiles & 1) - 1).reshape(-1, n)[:k]
    if "tensor_scale" in keywords:
        scales = scales.astype(jnp.float32) * keywords["tensor_scale"]
    wide = values.astype(jnp.bfloat16) + jnp.asarray(offset, jnp.bfloat16)
    w = (wide.reshape(scales.shape[0], -1, n) * scales.astype(jnp.bfloat16)).reshape(k, n)
    y = jnp.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)
    if "x_scales" in keywords:
        y = y * keywords["x_scales"]
    return y.astype(jnp.bfloat16)


def _qwix_dot(name: str, activation: str, shape: tuple[int, ...]) -> Peer:
    """x as an array, or as a QArray with a scale per row; qwix keeps scales in float32."""
    import qwix  # pyright: ignore  (optional: lint must pass without it)

    case = FORMATS[name]
    if case.offset or case.values == "int32":
        what = "half-offset values" if case.offset else "packed signs"
        raise ValueError(f"qwix has no {what}, as {name} has")
    m, k, n = shape
    x, values, _, keywords = abstract_operands(case, activation, m, k, n)
    scales = _array((k // case.group if case.group else 1, n), "float32")

    def function(x: Array, values: Array, scales: Array, x_scales: Array | None) -> Array:
        rows = x if x_scales is None else qwix.QArray(x, x_scales)
        numbers = (((1,), (0,)), ((), ()))
        y = qwix.dot_general(
            rows, qwix.QArray(values, scales), numbers, preferred_element_type=jnp.float32
        )
        return y.astype(jnp.bfloat16)

    return Peer(function, (x, values, scales, keywords.get("x_scales")))


def _qwix_kernel(name: str, activation: str, shape: tuple[int, ...]) -> Peer:
    """qwix's kernel with the coarsest scales it takes: one for x and one per 128 columns."""
    from qwix.contrib.kernels import quantized_matmul as kernel  # pyright: ignore

    if (name, activation) != ("int8", "int8"):
        raise ValueError(f"qwix's kernel multiplies int8 by int8, not {activation} by {name}")
    m, k, n = shape
    bm, bk, bn = (min(block, size) for block, size in zip(QWIX_BLOCKS, shape, strict=True))
    operands = (
        _array((m, k), "int8"),
        _array((1, 1), "float32"),
        _array((k, n), "int8"),
        _array((1, n // 128), "float32"),
    )
    function = partial(kernel.quantized_matmul, bm=bm, bk=bk, bn=bn, dtype=jnp.bfloat16)
    return Peer(function, operands, math.prod((-(-m // bm), -(-n // bn), -(-k // bk))))
