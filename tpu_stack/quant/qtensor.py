"""`QTensor`: a quantized weight that passes through jit, scan, eval_shape and device_put.

Static fields do not depend on leading (stacked layer) axes, so `lax.scan` may slice them off.

>>> stacked = abstract_qtensor((32, 4096, 14336), "int4")  # 32 layers of [K, N]
>>> jax.eval_shape(lambda q: jax.tree.map(lambda leaf: leaf[0], q), stacked).shape
(4096, 14336)
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.quant import elements
from tpu_stack.quant.formats import FORMATS, Format, get_format
from tpu_stack.quant.rotation import check_rotation, rotate

PARTS = ("values", "scales", "tensor_scale")
"""A QTensor's arrays; the last is None in most formats."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=PARTS,
    meta_fields=["format", "contract_axis", "rotation"],
)
@dataclass(frozen=True)
class QTensor:
    """A weight as grid values and scales: their product, the scale repeated over its group.

    Invariants (checked by `check`, not on construction, since JAX rebuilds trees from leaves that
    are not arrays):
      * contract_axis == -2: values [..., K, N], scales [..., K/g, 1, N], g the format's group or K;
        packed bits are int32 words [..., 8*ceil(K/256), N], and the scales' shape gives K;
      * contract_axis == -1 (embedding table, one scale per row): values [..., V, D],
        scales [..., V, 1];
      * `values` has the format's dtype, or after `widen()` that of `elements.widened_dtype`, with
        float32 scales;
      * a two-level format has `tensor_scale` [..., 1, 1, 1] float32 until widened, others None;
      * with `rotation` b, the values are those of the weight rotated along K in blocks of b;
      * leaves may be `jax.ShapeDtypeStruct`, PartitionSpecs or shardings, as in any tree.
    """

    values: Any
    scales: Any
    format: str
    contract_axis: int = -2
    tensor_scale: Any = None
    rotation: int = 0

    @property
    def packed_bits(self) -> bool:
        """Whether `values` are words of 32 one-bit values."""
        return self.spec.kind == "bits" and self.values.dtype == jnp.int32

    @property
    def widened(self) -> bool:
        """Whether `values` are what `widen` makes of another dtype."""
        return self.values.dtype == elements.widened_dtype(self.spec) != self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        if not self.packed_bits:
            return tuple(self.values.shape)
        rows = self.scales.shape[-3] * (self.spec.group or 0)
        return (*self.values.shape[:-2], rows, self.values.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def spec(self) -> Format:
        return get_format(self.format)

    @property
    def group(self) -> int:
        """Values along the contraction axis per scale."""
        groups = self.scales.shape[-3] if self.contract_axis == -2 else 1
        return self.shape[self.contract_axis] // groups

    @property
    def offset(self) -> float:
        """What to add to a stored value for its grid value: 0.5 for int2, else 0."""
        return 0.0 if self.widened else self.spec.offset

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes_packed / self.size

    @property
    def nbytes_packed(self) -> int:
        """Bytes in TPU memory and on disk, widened or not: `.nbytes` counts a byte for each
        sub-byte value."""
        *lead, rows, columns = self.shape
        scale_bytes = int(self.scales.size) * self.spec.scale_bits // 8
        level_bytes = 4 * prod(lead) if self.spec.two_level else 0
        return prod(lead) * columns * self.spec.column_bytes(rows) + scale_bytes + level_bytes

    def grid(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values without their scales [..., K, N], as floats: exact in bfloat16 and wider."""
        values = jnp.asarray(self.values)
        if self.widened:
            return values.astype(dtype)
        if self.spec.offset or self.packed_bits:
            return elements.decode(values, self.spec, self.shape[-2]).astype(dtype)
        return values.astype(dtype)

    def full_scales(self) -> jax.Array:
        """The scales in float32, the tensor's scale multiplied in."""
        scales = jnp.asarray(self.scales).astype(jnp.float32)
        return scales if self.tensor_scale is None else scales * self.tensor_scale

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the weight it stands for, [..., K, N], rounded once to `dtype`.

        A grid value times a bfloat16, e8m0 or two-level scale is exact in float32: those of 4 bits
        and fewer are exact unless rotated, when the sums of the rotation round.
        """
        grid, scales = self.grid(), self.full_scales()
        if self.contract_axis == -1:
            return (grid * scales).astype(dtype)
        *lead, k, n = grid.shape
        grouped = grid.reshape(*lead, scales.shape[-3], self.group, n)
        weight = (grouped * scales).reshape(*lead, k, n)
        return rotate(weight, self.rotation, -2).astype(dtype)

    def widen(self) -> "QTensor":
        """The same numbers in values that XLA:CPU reads fast, with float32 scales.

        That is int8, a byte each, or bfloat16 for 8-bit floats. XLA:CPU unpacks int4 about five
        times slower than it reads int8, and 8-bit floats slower yet, so a CPU server widens once
        when it loads. `nbytes_packed` still reports what the format costs where it is packed. int8
        is returned as it is. Host arrays stay host arrays.
        """
        if self.values.dtype == elements.widened_dtype(self.spec):
            return self
        values = elements.widen(self.values, self.spec, self.shape[-2])
        unit = np.float32(elements.widened_unit(self.spec))
        scales = self.scales.astype(np.float32) * unit
        if self.tensor_scale is not None:
            scales = scales * self.tensor_scale
        return replace(self, values=values, scales=scales, tensor_scale=None)

    def check(self, name: str = "weight") -> "QTensor":
        """Returns self; raises UserError naming the tensor when an invariant does not hold."""
        fmt = self.spec
        if not fmt.quantized or self.contract_axis not in (-1, -2) or self.ndim < 2:
            raise UserError(
                f"{name}: not a quantized tensor: format {self.format!r}, "
                f"contract_axis {self.contract_axis}, shape {tuple(self.values.shape)}"
            )
        if self.values.dtype not in (fmt.dtype, elements.widened_dtype(fmt)):
            raise UserError(f"{name}: {self.format} values cannot be {self.values.dtype}")
        want = scales_shape(self.shape, fmt, self.contract_axis, name)
        if tuple(self.scales.shape) != want:
            raise UserError(
                f"{name}: {self.format} values {list(self.shape)} need scales {list(want)}, "
                f"got {list(self.scales.shape)}"
            )
        if self.packed_bits and self.values.shape[-2] != fmt.rows_stored(self.shape[-2]):
            raise UserError(
                f"{name}: {self.format} words {list(self.values.shape)} do not hold the "
                f"{self.shape[-2]} rows of scales {list(self.scales.shape)}"
            )
        level = (*self.shape[:-2], 1, 1, 1) if fmt.two_level and not self.widened else None
        found = None if self.tensor_scale is None else tuple(self.tensor_scale.shape)
        if found != level:
            raise UserError(f"{name}: {self.format} needs tensor_scale {level}, got {found}")
        if self.rotation:
            check_rotation(self.rotation, self.shape[self.contract_axis], fmt.bits, name)
        return self


def scales_shape(
    shape: tuple[int, ...], fmt: Format, contract_axis: int, name: str = "weight"
) -> tuple[int, ...]:
    """The shape of the scales of a weight of `shape`; raises UserError if there can be none."""
    if contract_axis == -1:
        if fmt.group is not None:
            per_row = "int8"
            raise UserError(
                f"{name}: {fmt.name} has groups of {fmt.group} and cannot store rows "
                f"(contract_axis=-1); use {per_row}, one scale per row"
            )
        return (*shape[:-1], 1)
    *lead, k, n = shape
    group = fmt.group or k
    if group == 0 or k % group:
        raise UserError(
            f"{name}: shape {list(shape)}: K={k} is not a multiple of {fmt.name}'s group {group}"
            + _smaller_group(fmt, k)
        )
    return (*lead, k // group, 1, n)


def _smaller_group(fmt: Format, k: int) -> str:
    """A hint: the format with the same grid and the largest group that divides `k`, if any."""
    grid = (fmt.bits, fmt.low, fmt.high, fmt.offset, fmt.scale_dtype)
    fitting = [
        other
        for other in FORMATS.values()
        if (other.bits, other.low, other.high, other.offset, other.scale_dtype) == grid
        and other.group
        and k
        and k % other.group == 0
    ]
    return f"; {max(fitting, key=lambda f: f.group or 0).name} fits" if fitting else ""


def values_shape(shape: tuple[int, ...], fmt: Format) -> tuple[int, ...]:
    """The shape of the stored values of a weight of `shape`."""
    return (*shape[:-2], fmt.rows_stored(shape[-2]), shape[-1])


def abstract_qtensor(
    shape: tuple[int, ...],
    format: str,
    contract_axis: int = -2,
    rotation: int = 0,
    name: str = "weight",
) -> QTensor:
    """A QTensor of `jax.ShapeDtypeStruct`s, for planning without allocating.

    Raises UserError, naming the tensor, when the format cannot store the shape.
    """
    fmt = get_format(format)
    scales = scales_shape(shape, fmt, contract_axis, name)
    level = jax.ShapeDtypeStruct((*shape[:-2], 1, 1, 1), jnp.float32) if fmt.two_level else None
    return QTensor(
        jax.ShapeDtypeStruct(values_shape(shape, fmt), fmt.dtype),
        jax.ShapeDtypeStruct(scales, jnp.dtype(fmt.scale_dtype)),
        format,
        contract_axis,
        level,
        rotation,
    )
