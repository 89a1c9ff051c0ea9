"""Cases of `kernels.grouped_matmul`: eight experts in each quantized format.

The routing decides how often a block of rows is visited and which weights are read; both are means
over random routings. The operands have ragged groups of rows, one of them empty, and padding rows.

8-bit activations have cases for one group size of each format: the others differ only in the number
of scales per block, which the bfloat16 cases cover.

>>> next(cases()).name
'grouped_matmul int8 bf16'
"""

import dataclasses
import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.kernels.grouped_matmul import (
    grouped_matmul,
    make_grouped_plan,
    reference_grouped_matmul,
)
from tpu_stack.kernels.quantized_matmul.plan import Plan
from tpu_stack.planner.kernels import matmul_cases
from tpu_stack.planner.kernels.cases import Case, Operands, array_bytes
from tpu_stack.planner.kernels.matmul_cases import (
    ACTIVATIONS,
    abstract_rows,
    rows_of_x,
    weight_leaves,
)
from tpu_stack.quant import FORMATS, abstract_qtensor, get_format, quantize

EXPERTS = 8
SMALL = (37, 256, 200)
LARGE = (128, 4096, 14336)
ROUTINGS = 256


def cases() -> Iterator[Case]:
    """Every quantized format; one named for its group size (int4_g64) has bfloat16 rows only."""
    for fmt in FORMATS.values():
        activations = ("bf16",) if "_g" in fmt.name else tuple(ACTIVATIONS)
        for activation in activations if fmt.quantized else ():
            yield make_case(fmt.name, activation)


def make_case(format: str, activation: str) -> Case:
    """The case of a format and activation, even if the kernel refuses it."""
    return dataclasses.replace(
        matmul_cases.make_case(format, activation),
        op="grouped_matmul",
        small=SMALL,
        large=LARGE,
        operands=partial(_operands, format, activation),
        abstract=partial(_abstract, format, activation),
        call=partial(_call, format),
        reference=partial(_reference, format),
        dynamic_steps=partial(_visits, format, activation),
        unread=partial(_unread, format, activation),
    )


def group_sizes(m: int, seed: int) -> np.ndarray:
    """int [EXPERTS]: rows of each expert, ragged, one of them 0; their sum leaves padding rows."""
    rng = np.random.default_rng((seed, m))
    sizes = np.diff(np.sort(rng.integers(0, m, EXPERTS + 1)))
    sizes[2] = 0
    return sizes


def plan_of(
    format: str, activation: str, shape: tuple[int, ...], kind: str, **options: Any
) -> Plan:
    """The kernel's plan of the case for a device kind. Raises ValueError where it refuses."""
    arrays, rest = _split(_abstract(format, activation, shape))
    offset = get_format(format).offset
    return make_grouped_plan(*arrays, offset=offset, kind=kind, **rest, **options)


@functools.cache
def mean_visits(rows: int, block: int) -> tuple[float, float]:
    """Mean visits to blocks of `block` rows, and mean experts with rows, over ROUTINGS random
    routings of `rows` rows."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, np.full(EXPERTS, 1 / EXPERTS), ROUTINGS)
    ends = np.cumsum(sizes, 1)
    blocks = (ends - 1) // block - (ends - sizes) // block + 1
    busy = sizes > 0
    return float(np.where(busy, blocks, 0).sum(1).mean()), float(busy.sum(1).mean())


def _visits(
    format: str, activation: str, shape: tuple[int, ...], kind: str, **options: Any
) -> float:
    block = plan_of(format, activation, shape, kind, **options).bm
    return mean_visits(shape[0], block)[0]


def _unread(format: str, activation: str, shape: tuple[int, ...]) -> int:
    """Mean bytes of the weights of experts without rows."""
    idle = EXPERTS - mean_visits(shape[0], 1)[1]
    operands = _abstract(format, activation, shape)
    return round(sum(array_bytes(operands[name]) for name in ("values", "scales")) * idle / EXPERTS)


def _operands(format: str, activation: str, shape: tuple[int, ...], seed: int) -> Operands:
    m, k, n = shape
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((EXPERTS, k, n)).astype(np.float32)
    return rows_of_x(activation, m, k, rng) | {
        **weight_leaves(quantize(weight, format, name="experts")),
        "group_sizes": jnp.asarray(group_sizes(m, seed), jnp.int32),
    }


def _abstract(format: str, activation: str, shape: tuple[int, ...]) -> Operands:
    m, k, n = shape
    try:
        weight = abstract_qtensor((EXPERTS, k, n), format)
    except UserError as error:
        raise ValueError(str(error)) from error
    return (
        abstract_rows(activation, m, k)
        | weight_leaves(weight)
        | {"group_sizes": jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)}
    )


def _split(operands: Operands) -> tuple[tuple[Any, ...], Operands]:
    rest = dict(operands)
    return tuple(rest.pop(name) for name in ("x", "values", "scales", "group_sizes")), rest


def _call(format: str, operands: Operands, *, exact: bool = False, **options: Any) -> Any:
    arrays, rest = _split(operands)
    offset, out = get_format(format).offset, jnp.float32 if exact else jnp.bfloat16
    return grouped_matmul(*arrays, offset=offset, out_dtype=out, **rest, **options)


def _reference(format: str, operands: Operands) -> np.ndarray:
    arrays, rest = _split(operands)
    return reference_grouped_matmul(*arrays, offset=get_format(format).offset, **rest)
