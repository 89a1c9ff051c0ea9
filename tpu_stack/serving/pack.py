"""From a checkpoint to a bundle, a tensor at a time: restore, store in a format, write.

Example:
    manifest = pack(Path("runs/a"), "int4", profile, mesh, Path("bundle"))
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import get_format
from tpu_stack.serving.bundle import write_bundle
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.manifest import Manifest
from tpu_stack.serving.weights import Tensor, stored_tensor, work_sharding
from tpu_stack.sharding.axes import LAYERS, TensorSpec
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
        tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {run}")
        chat = ChatFormat.read(run)
        source = {"step": step, "profile": profile.name, "mesh": dict(profile.mesh)}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for spec in tensor_specs(config):
                weight = restore_tensor(store, step, spec, profile, mesh)
                yield (
                    spec.name,
                    _on_host(spec, stored_tensor(spec, weight, format, profile, mesh, rotation)),
                )
                listener(spec.name)

        return write_bundle(out, config, format, tokenizer, source, tensors(), rotation, chat)


def restore_tensor(
    store: CheckpointStore, step: int, spec: TensorSpec, profile: Profile, mesh: Mesh
) -> jax.Array:
    """One float32 parameter of `step`, where it is to be quantized."""
    place = work_sharding(spec, profile, mesh)
    abstract = jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=place)
    return store.restore_tensor(step, "params", spec.name, abstract)


def _on_host(spec: TensorSpec, layers: Iterable[Tensor]) -> Tensor:
    """A stored tensor with its layers stacked, as arrays of the host."""
    each = [jax.device_get(layer) for layer in layers]
    if spec.axes[0] != LAYERS:
        return each[0]
    return jax.tree.map(lambda *parts: np.stack(parts), *each)
