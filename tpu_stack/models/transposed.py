"""Product weights stored transposed, [N, K], where one CPU device serves them (`quant.transposed`).

>>> from tpu_stack.models.decoder import forward
>>> from tpu_stack.models.per_layer import per_layer
>>> params = transpose_weights(config, per_layer(params), mesh)
>>> logits_BTV = forward(config, params, tokens_BT)  # the same, up to the order of sums
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.per_layer import PerLayer
from tpu_stack.quant.transposed import transpose_weight
from tpu_stack.sharding.axes import LAYERS, TensorSpec


def transpose_weights(config: ModelConfig, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The parameter tree, its blocks' weights in layers, as one CPU device multiplies fastest; on
    any other mesh unchanged."""

    def one(spec: TensorSpec) -> Any:
        return transpose_tensor(spec, tensor_of(params, spec.name), mesh)

    return map_specs(config, one)


def transpose_tensor(spec: TensorSpec, weight: Any, mesh: Mesh) -> Any:
    """One tensor of a served model transposed. Unchanged: stacked tensors, experts, routers,
    embedding tables, and everything on a mesh other than one CPU device."""
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if not one_cpu or spec.contract_axis != -2:
        return weight
    if isinstance(weight, PerLayer) and len(spec.shape) == 3:
        return PerLayer(tuple(_transposed(layer, mesh) for layer in weight.layers))
    return _transposed(weight, mesh) if spec.axes[0] != LAYERS else weight


def _transposed(weight: Any, mesh: Mesh) -> Any:
    return jax.device_put(transpose_weight(weight), NamedSharding(mesh, PartitionSpec()))
