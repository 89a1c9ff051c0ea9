"""Logical axes: what each dimension of a tensor means, before any mesh is chosen.

A model declares `TensorSpec`s; a profile's rules map their axes to mesh axes (see rules.py).

>>> TensorSpec("wq", (32, 4096, 4096), "float32", (LAYERS, EMBED, HEADS), (1, 1, 128)).size
536870912
"""

from dataclasses import dataclass
from math import prod

BATCH = "batch"
LENGTH = "length"
EMBED = "embed"
FFW = "ffw"
HEADS = "heads"
KV_HEADS = "kv_heads"
VOCAB = "vocab"
LAYERS = "layers"
EXPERT = "expert"

LOGICAL_AXES = (BATCH, LENGTH, EMBED, FFW, HEADS, KV_HEADS, VOCAB, LAYERS, EXPERT)


@dataclass(frozen=True)
class TensorSpec:
    """An abstract tensor. Invariant: shape, axes and granules have one entry per dimension.

    Attributes:
      name: dotted path in the parameter tree.
      shape: elements per dimension.
      dtype: name of the dtype it is stored in.
      axes: logical axis per dimension; None is never sharded.
      granules: elements that must stay together per dimension. A dimension of 32 heads of 128 is
        stored as 4096 with granule 128, and has at most 32 shards.
      contract_axis: the dimension that a matmul with this tensor sums over, None where there is
        no matmul (norm scales). Quantization takes its scales along it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    granules: tuple[int, ...]
    contract_axis: int | None = None

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.axes) == len(self.granules):
            raise ValueError(
                f"{self.name}: {self.shape}, {self.axes}, {self.granules} differ in rank"
            )
        unknown = [axis for axis in self.axes if axis is not None and axis not in LOGICAL_AXES]
        if unknown:
            raise ValueError(f"{self.name}: unknown logical axes {unknown}; known: {LOGICAL_AXES}")

    @property
    def size(self) -> int:
        """Elements in all."""
        return prod(self.shape)
