"""The order of axes of packed weights in TPU memory: the one that the kernel reads.

XLA:TPU's default layout puts the axis that wastes less padding innermost. A table of 32,064
columns, a quarter of Llama 3's, is then column-major, and every decode step copies it before the
kernel runs (`tests/serving/compile_ragged_table.py`).

    jax.device_put(q.values, tpu_layout(sharding, "values", q.contract_axis, q.ndim))
"""

from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding


def tpu_layout(
    sharding: NamedSharding, part: str, contract_axis: int, ndim: int
) -> NamedSharding | Format:
    """Where to put one part of a QTensor, of `ndim` axes: "values", "scales" or "tensor_scale".

    Returns `sharding`, on TPU with the order of the part's axes in memory too.
    """
    mesh = sharding.mesh
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "tpu":
        return sharding
    return Format(Layout(major_to_minor=major_to_minor(part, contract_axis, ndim)), sharding)


def major_to_minor(part: str, contract_axis: int, ndim: int) -> tuple[int, ...]:
    """The axes of one part of a QTensor in memory, outermost first.

    All are row-major but scales, whose axis of size one would be padded to whole lanes: groups'
    [..., G, 1, N] are laid out as [G, N], and rows' [..., V, 1] as [1, V].
    """
    axes = list(range(ndim))
    if part == "scales":
        one = ndim - (2 if contract_axis == -2 else 1)
        axes[one - 1 : one + 1] = one, one - 1
    return tuple(axes)
