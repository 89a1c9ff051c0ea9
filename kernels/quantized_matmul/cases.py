"""Operands of the kernel in every format, for the tests and the benches.

>>> x, values, scales, keywords = random_operands(FORMATS["mxfp4"], "int8", m=16, k=256, n=128)
>>> values.shape, scales.shape, list(keywords)
((256, 128), (8, 1, 128), ['x_scales'])
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.kernels.quantized_matmul.widen import WORD_ROWS

ACTIVATIONS = ("bfloat16", "float32", "float8_e4m3fn", "int8")


@dataclass(frozen=True)
class Case:
    """The arrays of a format.

    Attributes:
      name: the format's name.
      values: dtype name of the values; int32 is words of 32 signs.
      scales: dtype name of the scales.
      group: rows that share a scale; 0 for one scale per column.
      offset: added to every value.
      tensor_scale: whether one more float32 scale multiplies all values.
      low, high: inclusive range of random integer values; 0, 0 for floats and words.
    """

    name: str
    values: str
    scales: str = "bfloat16"
    group: int = 32
    offset: float = 0.0
    tensor_scale: bool = False
    low: int = 0
    high: int = 0

    def value_rows(self, k: int) -> int:
        """Rows of the stored array for K rows of weight."""
        return 8 * -(-k // WORD_ROWS) if self.values == "int32" else k

    def scales_shape(self, k: int, n: int) -> tuple[int, int, int]:
        return (k // self.group if self.group else 1, 1, n)


def _grouped(case: Case) -> list[Case]:
    wider = [replace(case, name=f"{case.name}_g{g}", group=g) for g in (64, 128)]
    return [case, *wider]


FORMATS = {
    case.name: case
    for case in [
        Case("int8", "int8", "float32", 0, low=-128, high=127),
        Case("fp8_e4m3", "float8_e4m3fn", "float32", 0),
        Case("fp8_e5m2", "float8_e5m2", "float32", 0),
        *_grouped(Case("int4", "int4", low=-8, high=7)),
        Case("int4_channel", "int4", "float32", 0, low=-8, high=7),
        Case("mxfp4", "float4_e2m1fn", "float8_e8m0fnu"),
        Case("nvfp4", "float4_e2m1fn", "float8_e4m3fn", 16, tensor_scale=True),
        *_grouped(Case("int2", "int2", offset=0.5, low=-2, high=1)),
        *_grouped(Case("ternary", "int2", low=-1, high=1)),
        *_grouped(Case("int1", "int32")),
    ]
}


def stored_bytes(array: Any) -> float:
    """Bytes of an array in HBM, where XLA:TPU packs sub-byte dtypes."""
    bits = {"int4": 4, "float4_e2m1fn": 4, "int2": 2}
    return array.size * bits.get(array.dtype.name, 8 * array.dtype.itemsize) / 8


def abstract_operands(
    case: Case, activation: str, m: int, k: int, n: int, sharding: Any = None
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Abstract x, values, scales, and the keyword arguments that are arrays.

    The keyword "offset" is not among them: it is `case.offset`, a number.
    """

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    keywords = {}
    if activation in ("float8_e4m3fn", "int8"):
        keywords["x_scales"] = array((m, 1), "float32")
    if case.tensor_scale:
        keywords["tensor_scale"] = array((1, 1, 1), "float32")
    values = array((case.value_rows(k), n), case.values)
    return array((m, k), activation), values, array(case.scales_shape(k, n), case.scales), keywords


def random_operands(
    case: Case, activation: str, m: int, k: int, n: int, seed: int = 0
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Random x, values, scales and keyword arguments for `quantized_matmul`.

    K must be a multiple of the case's group. Signs past K are zero bits, as the layout requires.
    """
    rng = np.random.default_rng(seed)
    keywords: dict[str, Any] = {"offset": case.offset} if case.offset else {}
    if activation in ("float8_e4m3fn", "int8"):
        keywords["x_scales"] = jnp.asarray(rng.uniform(0.01, 0.1, (m, 1)), jnp.float32)
    if case.tensor_scale:
        keywords["tensor_scale"] = jnp.asarray([[[rng.uniform(0.5, 2)]]], jnp.float32)
    if activation == "int8":
        x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    else:
        x = jnp.asarray(rng.normal(size=(m, k)), jnp.float32).astype(activation)
    shape = case.scales_shape(k, n)
    if case.scales == "float8_e8m0fnu":
        scales = jnp.asarray(2.0 ** rng.integers(-6, 3, shape), jnp.float32)
    elif case.scales == "float8_e4m3fn":
        scales = jnp.asarray(rng.uniform(0.1, 8, shape), jnp.float32)
    else:
        scales = jnp.asarray(rng.normal(0, 0.1, shape), jnp.float32)
    return x, _random_values(case, k, n, rng), scales.astype(case.scales), keywords


def _random_values(case: Case, k: int, n: int, rng: np.random.Generator) -> jax.Array:
    if case.values == "int32":
        bits = np.zeros((case.value_rows(k) // 8, 32, 8, n), np.uint32)
        bits.reshape(-1, n)[:k] = rng.integers(0, 2, (k, n))
        words = (bits << np.arange(32, dtype=np.uint32).reshape(1, 32, 1, 1)).sum(
            1, dtype=np.uint32
        )
        return jnp.asarray(words.reshape(-1, n).view(np.int32))
    if case.high:
        return jnp.asarray(rng.integers(case.low, case.high + 1, (k, n)), jnp.int8).astype(
            case.values
        )
    return jnp.asarray(rng.normal(0, 2, (k, n)), jnp.float32).astype(case.values)
