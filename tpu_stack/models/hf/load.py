"""Weights of a published model into the sharded layout, one tensor at a time.

Our tensors are stacked over layers. Each is created in its layout, and every layer (and expert) is
written into its place on the devices: beside the model, the host never holds more than one tensor
of the source in the file's dtype and in float32.

    params = load_params(HuggingFaceFolder.open(path), profile, mesh)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.names import Piece
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile

Listener = Callable[[str], None]


class Source(Protocol):
    """An opened model: a Hugging Face folder, or a file of another kind with the same pieces."""

    @property
    def config(self) -> ModelConfig:
        """The model that it holds."""
        ...

    def pieces(self) -> list[Piece]:
        """What goes where."""
        ...

    def read(self, piece: Piece) -> np.ndarray:
        """A piece as it is stored here, [in, out]."""
        ...


def load_params(
    source: Source,
    profile: Profile,
    mesh: Mesh,
    listener: Listener = lambda name: None,
) -> dict[str, Any]:
    """The float32 parameter tree of the source's model, sharded by `profile` on `mesh`.

    `listener` is told each tensor's Hugging Face name once it is in place. Raises UserError when a
    tensor does not divide the mesh, or cannot be read.
    """
    profile.check(tensor_specs(source.config))
    by_target: dict[str, list[Piece]] = {}
    for piece in source.pieces():
        by_target.setdefault(piece.target, []).append(piece)

    def one(spec: TensorSpec) -> jax.Array:
        axes = tuple(profile.rules.partition_spec(spec.axes, spec.name))
        axes += (None,) * (len(spec.shape) - len(axes))
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        first = by_target[spec.name][0]
        if not first.index:
            whole = _host(source, first)
            listener(first.source)
            return _place(whole, sharding)
        stacked = jax.jit(partial(jnp.zeros, spec.shape, jnp.float32), out_shardings=sharding)()
        write = jax.jit(_write, donate_argnums=0, out_shardings=sharding)
        part = NamedSharding(mesh, PartitionSpec(*axes[len(first.index) :]))
        for piece in by_target[spec.name]:
            index = tuple(map(np.int32, piece.index))
            stacked = write(stacked, _place(_host(source, piece), part), index)
            stacked.block_until_ready()  # or the host would run ahead, a buffer for each
            listener(piece.source)
        return stacked

    return map_specs(source.config, one)


def _write(stacked: jax.Array, part: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    return stacked.at[index].set(part)


def _host(source: Source, piece: Piece) -> np.ndarray:
    return source.read(piece).astype(np.float32, order="C", copy=False)


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
