"""Weights as a tuple of layers in place of one stacked array: how they are served.

A scan over stacked weights copies a layer out of them before a product that cannot slice its own
operand: a Pallas kernel, and every product of XLA:CPU, where the copies took half of a decode step
(experiments/LOG.md). Training scans, which compiles once for all layers; serving unrolls them.

>>> params = per_layer(params)
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.quant.tpu_layout import tpu_layout
from tpu_stack.quant.transposed import Transposed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PerLayer:
    """One weight of every layer: arrays or QTensors without the layers' axis."""

    layers: tuple[Any, ...]


def is_weight(leaf: Any) -> bool:
    """Whether `leaf` is one weight of a parameter tree, though it may have parts."""
    return isinstance(leaf, PerLayer | QTensor | Transposed)


def per_layer(params: dict[str, Any]) -> dict[str, Any]:
    """The parameter tree with the blocks' weights split into layers; split ones stay."""
    return {**params, "blocks": jax.tree.map(split_layers, params["blocks"], is_leaf=is_weight)}


def split_layers(weight: Any) -> PerLayer:
    """One stacked weight split into its layers; a split one as it is."""
    if isinstance(weight, PerLayer):
        return weight
    count = jax.tree.leaves(weight)[0].shape[0]
    return PerLayer(tuple(_laid_out(weight, layer) for layer in range(count)))


def _laid_out(weight: Any, layer: int) -> Any:
    """One layer of a stacked weight on devices, laid out as the weight was; of an abstract one, an
    abstract layer."""

    def pick(part: Any, name: str | None = None) -> Any:
        sharding, place = getattr(part, "sharding", None), None
        if isinstance(sharding, NamedSharding):  # others stay where they are, committed or not
            place: Any = without_layers(sharding)
            if name is not None:
                place = tpu_layout(place, name, weight.contract_axis, part.ndim - 1)
        if isinstance(part, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(part.shape[1:], part.dtype, sharding=place)
        return part[layer] if place is None else jax.device_put(part[layer], place)

    if not isinstance(weight, QTensor):
        return pick(weight)
    names = ("values", "scales") if weight.tensor_scale is None else PARTS
    return replace(weight, **{name: pick(getattr(weight, name), name) for name in names})


def without_layers(sharding: NamedSharding) -> NamedSharding:
    """The layout of a layer of a stacked weight that has layout `sharding`."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def layer_of(weights: Any, layer: int) -> Any:
    """One layer of a tree of weights, stacked or split."""

    def pick(weight: Any) -> Any:
        if isinstance(weight, PerLayer):
            return weight.layers[layer]
        return jax.tree.map(lambda part: part[layer], weight)

    return jax.tree.map(pick, weights, is_leaf=is_weight)


def is_split(weights: Any) -> bool:
    """Whether any weight of the tree is split into layers."""
    leaves = jax.tree.leaves(weights, is_leaf=is_weight)
    return any(isinstance(leaf, PerLayer) for leaf in leaves)
