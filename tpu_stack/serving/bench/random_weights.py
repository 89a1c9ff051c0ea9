"""Random weights of a shape, packed as a bundle's would be: speed does not depend on the numbers.

>>> params = random_params(get_preset("qwen3_0_6b"), "int8", profile, mesh)
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.per_layer import split_layers
from tpu_stack.models.transposed import transpose_tensor
from tpu_stack.quant.policy import stored_format
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.quant.quantize import quantize
from tpu_stack.quant.tpu_layout import tpu_layout
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.sharding.axes import LAYERS, TensorSpec
from tpu_stack.sharding.profiles import Profile


def random_params(
    config: ModelConfig, format: str, profile: Profile, mesh: Mesh, seed: int = 0
) -> dict[str, Any]:
    """Normal weights with the standard deviation D**-0.5, in `format`, laid out on the mesh, the
    blocks' in layers, as `Bundle.load` splits and transposes them for an engine.

    `format` "float32" stores them whole. Raises UserError as `PackedLayout.of` does.
    """
    whole = format == "float32"
    layout = PackedLayout.of(config, "bf16" if whole else format, profile, mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def one(spec: TensorSpec) -> Any:
        weight = stacked(spec)
        weight = split_layers(weight) if spec.axes[0] == LAYERS else weight
        return transpose_tensor(spec, weight, mesh)

    def stacked(spec: TensorSpec) -> Any:
        target = tensor_of(layout.abstract, spec.name)
        std = config.d_model**-0.5
        weight = std * jax.random.normal(next(keys), spec.shape, jnp.float32)
        fmt = stored_format(spec, "bf16" if whole else format)
        if not fmt.quantized:
            dtype = jnp.float32 if whole else fmt.dtype
            return jax.device_put(weight.astype(dtype), target.sharding)
        assert spec.contract_axis is not None
        packed = quantize(weight, fmt, spec.contract_axis, name=spec.name)
        packed = packed.widen() if on_cpu else packed
        return _placed(packed, target)

    return map_specs(config, one)


def _placed(packed: QTensor, target: Any) -> QTensor:
    def put(part: str) -> Any:
        array = getattr(packed, part)
        if array is None:
            return None
        sharding = getattr(target, part).sharding
        return jax.device_put(array, tpu_layout(sharding, part, packed.contract_axis, array.ndim))

    return replace(packed, **{part: put(part) for part in PARTS})
