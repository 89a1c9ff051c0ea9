"""The weights of products turned, [N, K], where one CPU device serves them (`quant.turned`).

>>> params = turn_weights(config, per_layer(params), mesh)
>>> logits_BTV = forward(config, params, tokens_BT)  # the same, up to the order of sums
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.per_layer import PerLayer
from tpu_stack.quant.turned import turn
from tpu_stack.sharding.axes import LAYERS, TensorSpec


def turn_weights(config: ModelConfig, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameter tree, its blocks' weights in layers, as one CPU device multiplies fastest; on
    any other mesh as it is."""
    return map_specs(config, lambda spec: turn_weight(spec, tensor_of(params, spec.name), mesh))


def turn_weight(spec: TensorSpec, weight: Any, mesh: Mesh) -> Any:
    """One tensor of a served model turned, or as it is: a stacked one, a mixture's experts, a
    router, a table, and whatever is on another mesh than one CPU device."""
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if not one_cpu or spec.contract_axis != -2:
        return weight
    if isinstance(weight, PerLayer) and len(spec.shape) == 3:
        return PerLayer(tuple(_turned(layer, mesh) for layer in weight.layers))
    return _turned(weight, mesh) if spec.axes[0] != LAYERS else weight


def _turned(weight: Any, mesh: Mesh) -> Any:
    return jax.device_put(turn(weight), NamedSharding(mesh, PartitionSpec()))
