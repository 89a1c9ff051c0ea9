"""From a checkpoint to a bundle: restore in the serving layout, quantize, write.

>>> manifest = pack(Path("runs/a"), "int4", profile, mesh, Path("bundle"))
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.models.abstract import map_specs, tensor_of, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.policy import stored_format, stored_rotation
from tpu_stack.quant.quantize import quantize
from tpu_stack.serving.bundle import Tensor, write_bundle
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.manifest import Manifest
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile

Listener = Callable[[str], None]


def restore_for_serving(
    store: CheckpointStore, step: int, config: ModelConfig, profile: Profile, mesh: Mesh
) -> dict[str, Any]:
    """The float32 parameters of `step`, read straight into the serving layout.

    The checkpoint may come from any training mesh; Orbax reads each device's part of each tensor.
    """

    def placed(spec: TensorSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, profile.rules.partition_spec(spec.axes, spec.name))
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)

    return store.restore(step, "params", map_specs(config, placed))


def pack(
    run: Path,
    format: str,
    profile: Profile,
    mesh: Mesh,
    out: Path,
    *,
    step: int | None = None,
    rotation: int = 0,
    listener: Listener = lambda name: None,
) -> Manifest:
    """Packs step `step` (default: the newest) of the run folder `run` into the bundle `out`.

    `rotation` is the block in which the 4-bit weights' contraction is rotated, 0 for none (see
    `quant.rotation`). `listener` is told the name of every tensor once it is quantized. Raises
    UserError for a bad format or rotation, a damaged checkpoint, a tensor that does not divide the
    mesh, an existing `out`.
    """
    get_format(format)
    with CheckpointStore(run, read_only=True) as store:
        step = store.latest() if step is None else step
        meta = store.meta(step)
        config = ModelConfig.from_dict(meta["model"])
        # Refuses what would not load, before any work.
        PackedLayout.of(config, format, profile, mesh, rotation)
        params = restore_for_serving(store, step, config, profile, mesh)
    tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {run}")
    chat = ChatFormat.read(run)
    source = {"step": step, "profile": profile.name, "mesh": dict(profile.mesh)}
    tensors = _quantized(config, params, format, rotation, listener)
    return write_bundle(out, config, format, tokenizer, source, tensors, rotation, chat)


def _quantized(
    config: ModelConfig, params: dict[str, Any], format: str, rotation: int, listener: Listener
) -> Iterator[tuple[str, Tensor]]:
    for spec in tensor_specs(config):
        weight = tensor_of(params, spec.name)
        fmt = stored_format(spec, format)
        if fmt.quantized:
            assert spec.contract_axis is not None
            block = stored_rotation(spec, format, rotation)
            packed = quantize(weight, fmt, spec.contract_axis, rotation=block, name=spec.name)
            tensor: Tensor = jax.tree.map(np.asarray, jax.device_get(packed))
        else:
            tensor = np.asarray(jax.device_get(weight.astype(fmt.dtype)))
        listener(spec.name)
        yield spec.name, tensor
