"""The way from trainable parameters to the weights that an engine holds, each step in one place.

    reshard -> quantize -> widen (CPU) -> place (TPU layout) -> transpose (one CPU device)

A layer at a time: beside the parameters and the result there is one layer of work. `stored_tensor`
goes as far as a format, which `pack` writes to a bundle; `held_tensor` goes on from there, which is
where `Bundle.load` begins. In process one follows the other, without a disk:

    service = start_service(config, engine_weights(config, params, "int4", profile, mesh), ...)
    service.load(engine_weights(config, newer_params, "int4", profile, mesh))
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.per_layer import PerLayer, per_layer, without_layers
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.policy import stored_format, stored_rotation
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.quant.quantize import check_finite, quantize
from tpu_stack.quant.tpu_layout import tpu_layout
from tpu_stack.quant.transposed import transpose_weight
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.sharding.axes import LAYERS, TensorSpec
from tpu_stack.sharding.profiles import Profile

Tensor = Array | np.ndarray | QTensor
"""A weight as a format stores it, on devices or on the host."""
Source = Callable[[TensorSpec], Array | np.ndarray]
"""Gives the float32 value of a tensor."""


def engine_weights(
    config: ModelConfig,
    params: Mapping[str, Any] | Source,
    format: str,
    profile: Profile,
    mesh: Mesh,
    rotation: int = 0,
) -> dict[str, Any]:
    """The weights that an engine on `mesh` holds, from trainable parameters.

    They equal, bit for bit, what `Bundle.load(profile, mesh, split=True)` gives of a bundle that
    `pack` wrote for the same mesh. A second call with the same shapes compiles nothing.

    Args:
      params: the float32 tree, on any mesh, which is left alone; or a function that gives one of
        its tensors, to which nothing here refers any more when the next is asked for.
      format: a weight format. rotation: as in `pack`.

    Raises UserError for an unknown format, a tensor that does not divide the mesh, or weights that
    are NaN or infinite where the format quantizes them.
    """
    get_format(format)
    layout = PackedLayout.of(config, format, profile, mesh, rotation)

    def one(spec: TensorSpec) -> Any:
        weight = params(spec) if callable(params) else tensor_of(params, spec.name)
        layers = stored_tensor(spec, weight, format, profile, mesh, rotation)
        # or the host would run ahead, with work in memory for every layer of the model
        return jax.block_until_ready(
            held_tensor(spec, layers, tensor_of(layout.abstract, spec.name), mesh)
        )

    return map_specs(config, one)


# Storing ----------------------------------------------------------------------------------------


def stored_tensor(
    spec: TensorSpec,
    weight: Array | np.ndarray,
    format: str,
    profile: Profile,
    mesh: Mesh,
    rotation: int = 0,
) -> Iterator[Tensor]:
    """A float32 tensor as a model packed to `format` stores it, on devices.

    Yields every layer in turn, or the whole of a tensor that has no layers' axis. Raises UserError
    as `quantize` does.
    """
    fmt = stored_format(spec, format)
    if fmt.quantized:
        check_finite(weight, spec.name)
    block = stored_rotation(spec, format, rotation)
    place = work_sharding(spec, profile, mesh)
    place = without_layers(place) if _stacked(spec) and isinstance(place, NamedSharding) else place
    for layer in layers_of(spec, weight):
        yield _stored(jax.device_put(layer, place), fmt.name, spec.contract_axis, block)


def work_sharding(spec: TensorSpec, profile: Profile, mesh: Mesh) -> Sharding:
    """Where a float32 tensor is quantized: on the mesh, but on one of a CPU's virtual devices.

    These share the cores, and each would do what the mesh replicates.
    """
    if _on_cpu(mesh):
        return SingleDeviceSharding(mesh.devices.flat[0])
    return NamedSharding(mesh, profile.rules.partition_spec(spec.axes, spec.name))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _stored(
    weight: Array, format: str, contract_axis: int | None, rotation: int
) -> Array | QTensor:
    fmt = get_format(format)
    if not fmt.quantized:  # a copy: the caller may donate the weight to its next train step
        return jnp.array(weight, fmt.dtype, copy=True)
    assert contract_axis is not None
    return quantize(weight, fmt, contract_axis, rotation=rotation)


def layers_of(spec: TensorSpec, tensor: Any) -> Iterator[Any]:
    """Every layer of a stacked tensor, or the whole of one without a layers' axis."""
    if not _stacked(spec):
        yield tensor
        return
    for layer in range(spec.shape[0]):
        yield jax.tree.map(lambda part, at=layer: _layer(part, at), tensor)


def _layer(stacked: Any, layer: int) -> Any:
    if isinstance(stacked, np.ndarray):
        return stacked[layer]
    return _indexed(stacked, np.int32(layer))  # one program for all layers


@jax.jit
def _indexed(stacked: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _stacked(spec: TensorSpec) -> bool:
    return spec.axes[0] == LAYERS


# Holding ----------------------------------------------------------------------------------------


def held_tensor(spec: TensorSpec, layers: Iterable[Tensor], target: Any, mesh: Mesh) -> Any:
    """A stored tensor as an engine on `mesh` holds it: split into layers, each in its place, and
    transposed for one CPU device.

    `target` is the tensor's leaf of a `PackedLayout`, with all layers.
    """
    held = (_transposed(spec, placed(layer, target, mesh), mesh) for layer in layers)
    return PerLayer(tuple(held)) if _stacked(spec) else next(held)


def placed(tensor: Tensor, target: Any, mesh: Mesh) -> Any:
    """A stored tensor, stacked or one layer of it, in the layout of `target`.

    On CPU sub-byte values are widened to a byte each, which XLA:CPU reads five times faster; the
    numbers are the same.
    """
    if not isinstance(tensor, QTensor):
        return _place(tensor, target, mesh)
    if _on_cpu(mesh):
        on_host = isinstance(tensor.values, np.ndarray)
        tensor = tensor.widen() if on_host else _widened(tensor)

    def put(part: str) -> Any:
        array = getattr(tensor, part)
        if array is None:
            return None
        return _place(array, getattr(target, part), mesh, part, tensor.contract_axis)

    return replace(tensor, **{part: put(part) for part in PARTS})


_widened = jax.jit(QTensor.widen)


def _place(
    array: Array | np.ndarray,
    target: Any,
    mesh: Mesh,
    part: str | None = None,
    contract_axis: int = -2,
) -> Array:
    sharding = target.sharding
    if array.ndim < len(target.shape):
        sharding = without_layers(sharding)
    to: Any = sharding if part is None else tpu_layout(sharding, part, contract_axis, array.ndim)
    if to is sharding and _on_cpu(mesh):
        return _place_on_cpu(array, sharding)
    if isinstance(array, np.ndarray):
        return jax.make_array_from_callback(array.shape, to, lambda index: array[index])
    return jax.device_put(array, to)


def _place_on_cpu(array: Array | np.ndarray, sharding: NamedSharding) -> Array:
    """Replicas share memory: XLA:CPU takes an aligned host array as it is, on any number of its
    virtual devices, and arrays of JAX are aligned."""
    mesh: Any = sharding.mesh
    first = mesh.devices.flat[0]
    whole = np.asarray(jax.device_put(array, first))
    shards: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        name = str(index)
        if name not in shards:
            one = np.ascontiguousarray(whole[index])
            shards[name] = one if one is whole else np.asarray(jax.device_put(one, first))
        return shards[name]

    return jax.make_array_from_callback(whole.shape, sharding, shard)


def prepare(config: ModelConfig, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A parameter tree that lies on `mesh`, stacked or split, as an engine holds it.

    Weights that are so already stay as they are, so that the programs of an engine may take both.
    """
    params = per_layer(params)

    def one(spec: TensorSpec) -> Any:
        weight = tensor_of(params, spec.name)
        if isinstance(weight, PerLayer):
            return PerLayer(tuple(_transposed(spec, layer, mesh) for layer in weight.layers))
        return _transposed(spec, weight, mesh)

    return map_specs(config, one)


def _transposed(spec: TensorSpec, weight: Any, mesh: Mesh) -> Any:
    """A weight, without a layers' axis, transposed where one CPU device multiplies by it.

    Experts, routers and embedding tables are not.
    """
    matrix = len(spec.shape) == (3 if _stacked(spec) else 2)
    if mesh.size > 1 or not _on_cpu(mesh) or spec.contract_axis != -2 or not matrix:
        return weight
    return jax.device_put(transpose_weight(weight), NamedSharding(mesh, PartitionSpec()))


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"
