"""One kernel under proof: a `Case` is an op at a weight format and an activation type.

What an op's module of cases makes, and `case_registry` collects.

>>> get_case("quantized_matmul", "int4", "bf16").check_shape((16, 4096, 14336))
(16, 4096, 14336)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.errors import UserError

Operands = dict[str, Any]
"""Arguments of one call by name: arrays, or `jax.ShapeDtypeStruct`s when abstract."""


@dataclass(frozen=True)
class Case:
    """One kernel at one format and activation type.

    Invariants: `operands` and `abstract` give the same names, shapes and dtypes for a shape; `call`
    and `reference` take those names; `reference` returns float64.

    Attributes:
      op, format, activation: what names the case.
      axes: what the numbers of a shape mean, as in ("M", "K", "N").
      small: shape for the interpreter; every axis has a ragged edge.
      smooth: more shapes for the interpreter, without the ragged edges that keep a kernel from ways
        of its own on some chips.
      large: shape that is compiled and laid beside the roofline.
      operands: (shape, seed) -> concrete operands, the same for the same seed.
      abstract: shape -> abstract operands.
      call: (operands, **options) -> result; options are `interpret` and those of `tunable`.
      reference: operands -> the result in float64, from the operands as stored.
      flops: shape -> operations of the mathematics.
      pair: the operand types of its matrix product, as chip facts name them; None without one.
      limit: largest relative Frobenius error against `reference`, and `limit_reason` why.
      tunable: options of `call` that a tuner may set.
      dynamic_steps: (shape, device kind, **options) -> steps of the grid's axis that depends on
        data, on average over such data; None for a grid that shapes determine.
      unread: shape -> bytes of the operands that HBM need not carry, on the same average.
    """

    op: str
    format: str
    activation: str
    axes: tuple[str, ...]
    small: tuple[int, ...]
    large: tuple[int, ...]
    operands: Callable[[tuple[int, ...], int], Operands]
    abstract: Callable[[tuple[int, ...]], Operands]
    call: Callable[..., Any]
    reference: Callable[[Operands], np.ndarray]
    flops: Callable[[tuple[int, ...]], float]
    pair: tuple[str, str] | None
    limit: float
    limit_reason: str
    tunable: tuple[str, ...] = ()
    dynamic_steps: Callable[..., float] | None = None
    unread: Callable[[tuple[int, ...]], int] = lambda shape: 0
    smooth: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.format} {self.activation}"

    def check_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape`; raises UserError when it does not fit the op's axes or the kernel."""
        if len(shape) != len(self.axes) or min(shape) < 1:
            raise UserError(
                f"{self.op} takes a shape {','.join(self.axes)} of positive numbers, "
                f"got {','.join(map(str, shape))}"
            )
        try:
            self.out_shape(shape)
        except ValueError as error:
            raise UserError(f"{self.name} at {','.join(map(str, shape))}: {error}") from error
        return shape

    def out_shape(self, shape: tuple[int, ...], **options: Any) -> Any:
        """The abstract result. Raises ValueError, the kernel's own, where it refuses the call."""
        operands = self.abstract(shape)
        return jax.eval_shape(lambda a: self.call(a, interpret=True, **options), operands)

    def refusal(self) -> str | None:
        """The kernel's own reason for not taking this case, None when it takes it."""
        try:
            self.out_shape(self.small)
        except ValueError as error:
            return str(error)
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that HBM must carry once: operands and the result, sub-byte types packed, less what
        the case's data leave `unread`."""
        arrays = jax.tree.leaves((self.abstract(shape), self.out_shape(shape)))
        return sum(map(array_bytes, arrays)) - self.unread(shape)


def array_bytes(array: Any) -> int:
    """Packed bytes of an array or its abstract stand-in."""
    dtype = jnp.dtype(array.dtype)
    kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return -(-math.prod(array.shape) * int(kind(dtype).bits) // 8)


def parse_shape(text: str) -> tuple[int, ...]:
    """Numbers with commas between, as in 16,4096,14336. Raises UserError for anything else."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--shape {text!r} is not numbers with commas, as 16,4096,14336") from error
    if not shape or min(shape) < 1:
        raise UserError(f"--shape {text!r} has a number that is not positive")
    return shape
