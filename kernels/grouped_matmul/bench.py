"""Static cost of a mixture-of-experts product in each format (rung 3, compiled).

python -m tpu_stack.kernels.grouped_matmul.bench --chips v6e 7x --json bench.json
"""

from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

from tpu_stack.kernels.compiled import DEVICE_KIND, bench_main
from tpu_stack.kernels.grouped_matmul import grouped_matmul, make_grouped_plan
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands

NAMES = ("bfloat16", "int8", "fp8_e4m3", "int4", "mxfp4", "nvfp4", "int2", "ternary", "int1")
CASES = [f"{name},bfloat16,8,{m},2048,1024,-" for name in NAMES for m in (16, 4096)]
PEERS = {f"megablox,bfloat16,8,{m},2048,1024,-": CASES[i] for i, m in enumerate((16, 4096))}
"""megablox is the peer: JAX's own kernel for bfloat16 weights, with this kernel's tiles. What the
compiler refuses is a row that says so."""


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and abstract arguments of one case: FORMAT,X_DTYPE,E,M,K,N,t|-."""
    name, activation, *sizes, orientation = case.split(",")
    experts, m, k, n = (int(size) for size in sizes)
    if name == "megablox":
        return _megablox(experts, m, k, n, transpose=orientation == "t")

    def stacked(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((experts, *array.shape), array.dtype)

    options: dict[str, Any] = {"interpret": False, "transpose": orientation == "t"}
    if name == "bfloat16":
        values, scales, arrays = jax.ShapeDtypeStruct((k, n), jnp.bfloat16), None, {}
    else:
        options["offset"] = FORMATS[name].offset
        _, values, scales, arrays = abstract_operands(FORMATS[name], activation, m, k, n)
    if name == "int1" and options["transpose"]:
        options["rows"] = k
    if "tensor_scale" in arrays:
        arrays["tensor_scale"] = stacked(arrays["tensor_scale"])
    x = jax.ShapeDtypeStruct((m, n if options["transpose"] else k), jnp.dtype(activation))
    arguments = [x, stacked(values), jax.ShapeDtypeStruct((experts,), jnp.int32)]
    given = {**arrays, **({} if scales is None else {"scales": stacked(scales)})}
    return partial(_call, names=tuple(given), options=options), [*arguments, *given.values()]


def _megablox(
    experts: int, m: int, k: int, n: int, transpose: bool
) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    arguments = [
        jax.ShapeDtypeStruct((m, n if transpose else k), jnp.bfloat16),
        jax.ShapeDtypeStruct((experts, k, n), jnp.bfloat16),
        jax.ShapeDtypeStruct((experts,), jnp.int32),
    ]
    plan = make_grouped_plan(arguments[0], arguments[1], None, arguments[2], transpose)
    tiling = (plan.bm, plan.bk, plan.bn)
    call = partial(gmm, preferred_element_type=jnp.bfloat16, tiling=tiling, transpose_rhs=transpose)
    return call, arguments


def _call(x, values, group_sizes, *rest, names: tuple[str, ...], options: dict[str, Any]) -> Any:
    given = dict(zip(names, rest, strict=True))
    return grouped_matmul(x, values, given.pop("scales", None), group_sizes, **given, **options)


def trips(case: str, chip: str) -> tuple[int, ...]:
    """Steps of the grid when all experts get as many rows, megablox's being the same."""
    experts, m = (int(size) for size in case.split(",")[2:4])
    call, (x, values, groups, *rest) = program(case.replace("megablox", "bfloat16"))
    given: dict[str, Any] = dict(zip(call.keywords["names"], rest, strict=True))
    options = {k: v for k, v in call.keywords["options"].items() if k != "interpret"}
    scales = given.pop("scales", None)
    plan = make_grouped_plan(x, values, scales, groups, kind=DEVICE_KIND[chip], **options, **given)
    ends = list(accumulate(m // experts + (e < m % experts) for e in range(experts)))
    starts = [0, *ends[:-1]]
    visits = sum(
        (end - 1) // plan.bm - start // plan.bm + 1
        for start, end in zip(starts, ends, strict=True)
        if end > start
    )
    return (plan.grid[1] * visits * plan.grid[2],)


if __name__ == "__main__":
    bench_main(
        "tpu_stack.kernels.grouped_matmul.bench",
        __doc__,
        [*CASES, *PEERS],
        "FORMAT,X_DTYPE,E,M,K,N,t|-",
        trips,
        PEERS,
    )
