"""Operand dtypes of the MXU by chip, and whether the chip multiplies them natively.

The facts are `TpuInfo.is_matmul_supported` of jax. Dtypes that a chip does not multiply are cast to
bfloat16, which represents every stored weight exactly. A product without a native unit is
*emulated*.

>>> is_native("TPU v6 lite", "int8", "int8"), is_native("TPU7x", "int8", "int8")
(True, False)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.quantized_matmul.widen import Storage

_VERSIONS = {
    "TPU v4": pltpu.ChipVersion.TPU_V4,
    "TPU v5 lite": pltpu.ChipVersion.TPU_V5E,
    "TPU v5e": pltpu.ChipVersion.TPU_V5E,
    "TPU v5": pltpu.ChipVersion.TPU_V5P,
    "TPU v5p": pltpu.ChipVersion.TPU_V5P,
    "TPU v6 lite": pltpu.ChipVersion.TPU_V6E,
    "TPU v6e": pltpu.ChipVersion.TPU_V6E,
    "TPU7x": pltpu.ChipVersion.TPU_7X,
    "TPU8i": pltpu.ChipVersion.TPU_8I,
    "TPU8t": pltpu.ChipVersion.TPU_8T,
}
_CASTS_FLOAT4 = ("TPU7x", "TPU8i", "TPU8t")
"""Where Mosaic casts e2m1; elsewhere "Unsupported cast". TPU 8 is taken to resemble 7x."""

_TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


def cores_of(kind: str) -> int:
    """TensorCores of a device of this kind, which share a grid."""
    return 2 if kind in _TWO_CORES else 1


def device_kind() -> str:
    """The device kind to trace for: that of the abstract mesh, else of the default device."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def casts_float4(kind: str) -> bool:
    """Whether a kernel can cast float4_e2m1fn on this device kind."""
    return kind in _CASTS_FLOAT4


def chip_info(kind: str) -> pltpu.TpuInfo | None:
    """jax's facts about one core of this device kind; None if it is not a TPU."""
    version = _VERSIONS.get(kind)
    return None if version is None else pltpu.get_tpu_info_for_chip(version, 1)


def mxu_depth(kind: str) -> int:
    """Rows of a weight that the MXU holds at once; 256 if the device kind is not a TPU."""
    info = chip_info(kind)
    return 256 if info is None else info.mxu_column_size


def is_native(kind: str, left: Any, right: Any) -> bool:
    """Whether the MXU multiplies these dtypes natively; False if it is not a TPU."""
    info = chip_info(kind)
    return info is not None and bool(info.is_matmul_supported(jnp.dtype(left), jnp.dtype(right)))


def has_no_int8(kind: str) -> bool:
    """Whether this is a TPU whose MXU multiplies floats only."""
    return kind in _VERSIONS and not is_native(kind, "int8", "int8")


def choose_operands(
    x_dtype: Any, storage: Storage, mode: str, kind: str, scales_dtype: Any = "bfloat16"
) -> tuple[str, str]:
    """Dtype names of x and of the weight in the MXU.

    Scales that are applied before the product ("before", "input") make both bfloat16, except powers
    of two: they keep e2m1 within float8_e5m2, which the MXU loads at twice the rate. int8 by int8
    is exact in int32 on every chip, so it stays int8 even where it is emulated (but see
    `strategy.choose_strategy`).
    """
    x = jnp.dtype(x_dtype).name
    if x == "float32":
        return x, x
    scaled_first = mode in ("before", "input")
    if x == "int8":
        integers = not scaled_first and storage.exact_in(jnp.int8)
        return (x, x) if integers else ("bfloat16", "bfloat16")
    shifts = storage.name == "float4" and jnp.dtype(scales_dtype).name == "float8_e8m0fnu"
    if mode == "before" and shifts and is_native(kind, x, "float8_e5m2"):
        return x, "float8_e5m2"
    if scaled_first:
        return "bfloat16", "bfloat16"
    narrow = [storage.dtype] if storage.name in ("integer", "float8") else []
    if storage.dtype != "int2":  # its cast to float8 takes four times that to bfloat16
        narrow.append("float8_e4m3fn")
    for name in narrow:
        if name != "int8" and storage.exact_in(name) and is_native(kind, x, name):
            return x, name
    if storage.name == "float8" and kind in _VERSIONS:
        # Mosaic emulates the mixed product with a sixth of the instructions of a cast.
        return "bfloat16", storage.dtype
    return "bfloat16", "bfloat16"


def support(kind: str, x_dtype: Any, storage: Storage, operands: tuple[str, str]) -> str:
    """One line: "native" or "emulated", and the reason."""
    left, right = operands
    stored = "a word of 1-bit weights" if storage.name == "signs" else storage.dtype
    product = f"{left} x {right}"
    if kind not in _VERSIONS:
        return f"emulated: no matmul facts for {kind!r}; {stored} is widened, {product} multiplied"
    if not is_native(kind, left, right):
        return f"emulated: {kind} has no {product} unit"
    x = jnp.dtype(x_dtype).name
    if x != left:
        return f"emulated: {x} activations are widened, {kind} multiplies {product}"
    if right == storage.dtype:
        return f"native: {kind} multiplies {product}"
    return f"native: {kind} multiplies {product}; {stored} is widened in VMEM"
