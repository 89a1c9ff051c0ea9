"""Cases of `kernels.quantize_rows`: activations quantized to each 8-bit dtype.

>>> next(cases()).name
'quantize_rows fp8_e4m3 bf16'
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.kernels.quantize_rows import quantize_rows, reference_quantize_rows
from tpu_stack.planner.kernels.cases import Case, Operands

TYPES = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8"}


def cases() -> Iterator[Case]:
    """One case per dtype that rows are quantized to."""
    for format in TYPES:
        yield make_case(format, "bf16")


def make_case(format: str, activation: str) -> Case:
    """The case of one dtype, from bfloat16 rows."""
    dtype = TYPES[format]
    return Case(
        op="quantize_rows",
        format=format,
        activation=activation,
        axes=("M", "K"),
        small=(21, 650),
        large=(2048, 4096),
        operands=_operands,
        abstract=lambda shape: {"x": jax.ShapeDtypeStruct(shape, jnp.bfloat16)},
        call=partial(_call, dtype),
        reference=partial(_reference, dtype),
        flops=lambda shape: 2.0 * shape[0] * shape[1],
        pair=None,
        limit=1e-6,
        limit_reason="the reference does the same float32 arithmetic and rounds at the same places",
    )


def _operands(shape: tuple[int, ...], seed: int) -> Operands:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))
    x[0] = 0.0
    return {"x": jnp.asarray(x, jnp.bfloat16)}


def _call(dtype: str, operands: Operands, *, exact: bool = False, **options: Any) -> Any:
    """(values, scales); when `exact`, their product in float32."""
    values, scales = quantize_rows(operands["x"], dtype, **options)
    return values.astype(jnp.float32) * scales if exact else (values, scales)


def _reference(dtype: str, operands: Operands) -> np.ndarray:
    values, scales = reference_quantize_rows(operands["x"], dtype)
    return values.astype(np.float64) * scales
