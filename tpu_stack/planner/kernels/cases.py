"""A `Case`: one op with one format and activation dtype, with everything needed to verify it.

Each op's `*_cases` module makes them, and `case_registry` collects them.

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
    """One op with one format and activation dtype.

    Invariants: `operands` and `abstract` give the same names, shapes and dtypes for a shape; `call`
    and `reference` take those names; `reference` returns float64.

    Attributes:
      op, format, activation: the name of the case.
      axes: names of a shape's numbers, such as ("M", "K", "N").
      small: the interpreter's shape, ragged in every axis.
      aligned: more shapes for the interpreter, without ragged edges, which rule out some of a
        kernel's strategies.
      large: the shape that is compiled and compared with the roofline.
      operands: (shape, seed) -> concrete operands, deterministic in the seed.
      abstract: shape -> abstract operands.
      call: (operands, **options) -> result. Options are `interpret`, `exact` (the result to compare
        with `reference`, in float32 where the op can) and a tuner's (`Setting.options`).
      reference: operands -> the float64 result from the operands as stored.
      flops: shape -> floating-point operations.
      pair: operand dtypes of the matmul, as `Chip.peak_flops_per_s` takes them; None without one.
      limit: largest relative Frobenius error against `reference`; `limit_reason`: why.
      dynamic_steps: (shape, device kind, **options) -> mean steps of the grid's dynamic axis; None
        for a static grid.
      unread: shape -> mean bytes of operands that a call does not read, such as idle experts.
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
    dynamic_steps: Callable[..., float] | None = None
    unread: Callable[[tuple[int, ...]], int] = lambda shape: 0
    aligned: tuple[tuple[int, ...], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.format} {self.activation}"

    def check_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `shape`. Raises: UserError when it does not fit the op's axes or the kernel."""
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
        """The abstract result. Raises: ValueError from the kernel when it refuses the call."""
        operands = self.abstract(shape)
        return jax.eval_shape(lambda a: self.call(a, interpret=True, **options), operands)

    def refusal(self) -> str | None:
        """The kernel's reason for refusing this case, or None."""
        try:
            self.out_shape(self.small)
        except ValueError as error:
            return str(error)
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Packed bytes that a call moves through HBM: operands and result once, less `unread`."""
        arrays = jax.tree.leaves((self.abstract(shape), self.out_shape(shape)))
        return sum(map(array_bytes, arrays)) - self.unread(shape)


def array_bytes(array: Any) -> int:
    """Packed bytes of an array or `jax.ShapeDtypeStruct`."""
    dtype = jnp.dtype(array.dtype)
    kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return -(-math.prod(array.shape) * int(kind(dtype).bits) // 8)


def parse_shape(text: str) -> tuple[int, ...]:
    """Parses numbers with commas, such as 16,4096,14336. Raises: UserError for anything else."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--shape {text!r} is not numbers with commas, as 16,4096,14336") from error
    if not shape or min(shape) < 1:
        raise UserError(f"--shape {text!r} has a number that is not positive")
    return shape
