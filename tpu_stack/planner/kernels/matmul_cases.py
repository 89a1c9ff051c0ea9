"""Cases of `kernels.quantized_matmul`: every quantized format with every activation.

>>> next(cases()).name
'quantized_matmul int8 bf16'
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.kernels.quantized_matmul import quantized_matmul, reference_quantized_matmul
from tpu_stack.planner.kernels.cases import Case, Operands
from tpu_stack.quant import FORMATS, QTensor, abstract_qtensor, get_format, quantize

ACTIVATIONS = {"bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"}
"""Name on the command line -> dtype of x. 8-bit activations have a float32 scale per row."""

SMALL = (5, 640, 200)
ALIGNED = (5, 640, 256)
"""N is a multiple of 128, which e5m2 bit planes require."""
LARGE = (16, 4096, 14336)


def cases() -> Iterator[Case]:
    """Every format with every activation."""
    for fmt in FORMATS.values():
        for activation in ACTIVATIONS if fmt.quantized else ():
            yield make_case(fmt.name, activation)


def product_type(format: str) -> str:
    """The narrowest matmul operand dtype that represents the format's values exactly."""
    fmt = get_format(format)
    if fmt.storage == "int32":
        return "int2"
    return "int4" if fmt.offset else fmt.storage


def make_case(format: str, activation: str) -> Case:
    """The case of a format and activation, even if the kernel refuses it."""
    limit, reason = _limit(format, activation)
    return Case(
        op="quantized_matmul",
        format=format,
        activation=activation,
        axes=("M", "K", "N"),
        small=SMALL,
        large=LARGE,
        operands=partial(_operands, format, activation),
        abstract=partial(_abstract, format, activation),
        call=partial(_call, format),
        reference=partial(_reference, format),
        flops=lambda shape: 2.0 * shape[0] * shape[1] * shape[2],
        pair=(ACTIVATIONS[activation], product_type(format)),
        limit=limit,
        limit_reason=reason,
        aligned=(ALIGNED,),
    )


def _limit(format: str, activation: str) -> tuple[float, str]:
    """The error limit and its reason.

    Products of low-bit numbers are exact in float32; scaling the weight in bfloat16 rounds it, by
    a relative error of up to 2**-8. That is 1.7e-3 in the Frobenius norm, and 3e-3 leaves room for
    the accumulator. Integers with one scale per row and column round in float32 only.
    """
    if activation == "int8" and format == "int8":
        return 1e-6, "int32 accumulation is exact; two float32 scales round"
    return 3e-3, "the scaled weight is rounded to bfloat16 once: 1.7e-3, and the accumulator"


def rows_of_x(activation: str, m: int, k: int, rng: np.random.Generator) -> Operands:
    """Gaussian x [m, k], quantized per row for 8-bit activations."""
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
    if activation == "bf16":
        return {"x": x.astype(jnp.bfloat16)}
    largest = 127.0 if activation == "int8" else 448.0
    scales = jnp.abs(x).max(1, keepdims=True) / largest
    scaled = jnp.round(x / scales) if activation == "int8" else x / scales
    return {"x": scaled.astype(ACTIVATIONS[activation]), "x_scales": scales}


def abstract_rows(activation: str, m: int, k: int) -> Operands:
    """The abstract form of `rows_of_x`."""
    operands: Operands = {"x": jax.ShapeDtypeStruct((m, k), jnp.dtype(ACTIVATIONS[activation]))}
    if activation != "bf16":
        operands["x_scales"] = jax.ShapeDtypeStruct((m, 1), jnp.float32)
    return operands


def weight_leaves(weight: QTensor) -> Operands:
    """A quantized weight as keyword arguments of the kernels."""
    found = {"values": weight.values, "scales": weight.scales}
    if weight.tensor_scale is not None:
        found["tensor_scale"] = weight.tensor_scale
    return found


def _operands(format: str, activation: str, shape: tuple[int, ...], seed: int) -> Operands:
    m, k, n = shape
    rng = np.random.default_rng(seed)
    weight = quantize(rng.standard_normal((k, n)).astype(np.float32), format, name="weight")
    return rows_of_x(activation, m, k, rng) | weight_leaves(weight)


def _abstract(format: str, activation: str, shape: tuple[int, ...]) -> Operands:
    m, k, n = shape
    try:
        weight = abstract_qtensor((k, n), format)
    except UserError as error:
        raise ValueError(str(error)) from error
    return abstract_rows(activation, m, k) | weight_leaves(weight)


def _call(format: str, operands: Operands, **options: Any) -> Any:
    arrays = dict(operands)
    x, values, scales = (arrays.pop(name) for name in ("x", "values", "scales"))
    offset = get_format(format).offset
    out = jnp.float32 if options.pop("exact", False) else jnp.bfloat16
    return quantized_matmul(x, values, scales, offset=offset, out_dtype=out, **arrays, **options)


def _reference(format: str, operands: Operands) -> np.ndarray:
    arrays = dict(operands)
    x, values, scales = (arrays.pop(name) for name in ("x", "values", "scales"))
    offset = get_format(format).offset
    return reference_quantized_matmul(x, values, scales, offset=offset, **arrays)
