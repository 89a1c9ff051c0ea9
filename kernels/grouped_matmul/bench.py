"""Static cost of a mixture-of-experts product in each format (rung 3, compiled).

python -m tpu_stack.kernels.grouped_matmul.bench --chips v6e 7x --json bench.json
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.kernels.compiled import bench_main
from tpu_stack.kernels.grouped_matmul import grouped_matmul
from tpu_stack.kernels.quantized_matmul.cases import FORMATS, abstract_operands

NAMES = ("bfloat16", "int8", "fp8_e4m3", "int4", "mxfp4", "nvfp4", "int2", "ternary", "int1")
CASES = [f"{name},bfloat16,8,{m},2048,1024,-" for name in NAMES for m in (16, 4096)]


def program(case: str) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The call and abstract arguments of one case: FORMAT,X_DTYPE,E,M,K,N,t|-."""
    name, activation, *sizes, orientation = case.split(",")
    experts, m, k, n = (int(size) for size in sizes)

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


def _call(x, values, group_sizes, *rest, names: tuple[str, ...], options: dict[str, Any]) -> Any:
    given = dict(zip(names, rest, strict=True))
    return grouped_matmul(x, values, given.pop("scales", None), group_sizes, **given, **options)


if __name__ == "__main__":
    bench_main(
        "tpu_stack.kernels.grouped_matmul.bench", __doc__, CASES, "FORMAT,X_DTYPE,E,M,K,N,t|-"
    )
