"""How packed weights lie in a TPU's memory, so that the kernel reads them where they are.

Left alone, XLA:TPU puts the axis that wastes less padding innermost: a table of 32,064 columns,
a quarter of Llama 3's, then lies column by column, and every decode step copies it before the
kernel runs (`tests/serving/compile_ragged_table.py`).

>>> jax.device_put(q.values, in_place(sharding, "values", q.contract_axis, q.ndim))
"""

from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding


def in_place(
    sharding: NamedSharding, part: str, contract_axis: int, ndim: int
) -> NamedSharding | Format:
    """Where to put one part of a QTensor, "values", "scales" or "tensor_scale", of `ndim` axes:
    `sharding`, and on TPU with the order of its axes too."""
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "tpu":
        return sharding
    return Format(Layout(major_to_minor=order_of(part, contract_axis, ndim)), sharding)


def order_of(part: str, contract_axis: int, ndim: int) -> tuple[int, ...]:
    """The axes from the outermost in memory to the innermost: as they stand, but for scales, whose
    axis of one is not to be padded to whole lanes. Groups' [..., G, 1, N] are read as [G, N], and
    rows' [..., V, 1] as [1, V]."""
    axes = list(range(ndim))
    if part == "scales":
        one = ndim - (2 if contract_axis == -2 else 1)
        axes[one - 1 : one + 1] = one, one - 1
    return tuple(axes)
