"""`QTensor`: a quantized weight that passes through jit, scan, eval_shape and device_put.

Static fields do not depend on leading (stacked layer) axes, so `lax.scan` may slice them off.

>>> layer = jax.tree.map(lambda leaf: leaf[0], stacked)  # still a QTensor
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_stack.errors import UserError
from tpu_stack.quant.formats import Format, get_format


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["format", "contract_axis"],
)
@dataclass(frozen=True)
class QTensor:
    """A weight as integers and scales: `values * scales`, the scale repeated over its group.

    Invariants (checked by `check`, not on construction, since JAX rebuilds trees from leaves that
    are not arrays):
      * contract_axis == -2: values [..., K, N], scales [..., K/g, 1, N], g the format's group or K;
      * contract_axis == -1 (embedding table, one scale per row): values [..., V, D],
        scales [..., V, 1];
      * `values` has the format's dtype, or int8 after `widen()`; leaves may be
        `jax.ShapeDtypeStruct`, PartitionSpecs or shardings, as in any tree.
    """

    values: Any
    scales: Any
    format: str
    contract_axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return int(self.values.size)

    @property
    def spec(self) -> Format:
        return get_format(self.format)

    @property
    def group(self) -> int:
        """Values along the contraction axis per scale."""
        groups = self.scales.shape[-3] if self.contract_axis == -2 else 1
        return self.shape[self.contract_axis] // groups

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes_packed / self.size

    @property
    def nbytes_packed(self) -> int:
        """Bytes in TPU memory and on disk. `.nbytes` counts a byte for each sub-byte value."""
        rows = self.shape[-2]
        per_column = (rows * self.spec.bits + 7) // 8  # nibbles pair up along the second-minor axis
        scale_bytes = int(self.scales.size) * jnp.dtype(self.scales.dtype).itemsize
        return self.size // rows * per_column + scale_bytes if rows else scale_bytes

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns the weight it stands for, [..., K, N], rounded once to `dtype`.

        The product of a low-bit integer and a bfloat16 scale is exact in float32.
        """
        values = self.values.astype(jnp.float32)
        scales = self.scales.astype(jnp.float32)
        if self.contract_axis == -1:
            return (values * scales).astype(dtype)
        *lead, k, n = values.shape
        grouped = values.reshape(*lead, scales.shape[-3], self.group, n)
        return (grouped * scales).reshape(*lead, k, n).astype(dtype)

    def widen(self) -> "QTensor":
        """The same numbers with values as int8, a byte each.

        XLA:CPU unpacks int4 about five times slower than it reads int8, so a CPU server widens
        once when it loads. `nbytes_packed` still reports what the format costs where it is packed.
        """
        return QTensor(self.values.astype(jnp.int8), self.scales, self.format, self.contract_axis)

    def check(self, name: str = "weight") -> "QTensor":
        """Returns self; raises UserError naming the tensor when an invariant does not hold."""
        fmt = self.spec
        if not fmt.quantized or self.contract_axis not in (-1, -2) or self.ndim < 2:
            raise UserError(
                f"{name}: not a quantized tensor: format {self.format!r}, "
                f"contract_axis {self.contract_axis}, shape {self.shape}"
            )
        want = scales_shape(self.shape, fmt, self.contract_axis, name)
        if tuple(self.scales.shape) != want:
            raise UserError(
                f"{name}: {self.format} values {list(self.shape)} need scales {list(want)}, "
                f"got {list(self.scales.shape)}"
            )
        if self.values.dtype not in (fmt.dtype, jnp.dtype(jnp.int8)):
            raise UserError(f"{name}: {self.format} values cannot be {self.values.dtype}")
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
        )
    return (*lead, k // group, 1, n)


def abstract_qtensor(shape: tuple[int, ...], format: str, contract_axis: int = -2) -> QTensor:
    """A QTensor of `jax.ShapeDtypeStruct`s, for planning without allocating."""
    fmt = get_format(format)
    scales = scales_shape(shape, fmt, contract_axis)
    return QTensor(
        jax.ShapeDtypeStruct(shape, fmt.dtype),
        jax.ShapeDtypeStruct(scales, jnp.dtype(fmt.scale_dtype)),
        format,
        contract_axis,
    )
