"""Where the training state lives: shapes and shardings of every leaf, without allocating any.

>>> layout = StateLayout.of(config, optimizer, profile, mesh)
>>> state = layout.init(seed=0)
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, init_params
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import Profile
from tpu_stack.training.step import TrainState


@dataclass(frozen=True)
class StateLayout:
    """Abstract training state with the sharding of every leaf, and the sharding of a batch."""

    config: ModelConfig
    optimizer: optax.GradientTransformation
    abstract: TrainState
    batch: NamedSharding

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        profile: Profile,
        mesh: Mesh,
    ) -> "StateLayout":
        """The layout under `profile` on `mesh`. Raises UserError when a tensor does not divide."""
        profile.check(tensor_specs(config))
        rules, replicated = profile.rules, NamedSharding(mesh, PartitionSpec())

        def with_sharding(spec):
            sharding = NamedSharding(mesh, rules.partition_spec(spec.axes, spec.name))
            return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)

        def like_param(leaf, param):
            if isinstance(leaf, optax.MaskedNode):  # another optimizer updates this parameter
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

        params = map_specs(config, with_sharding)
        opt_state = optax.tree.map_params(
            optimizer,
            like_param,
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=replicated
            ),
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        )
        scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        key: Any = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated)
        batch = NamedSharding(mesh, rules.partition_spec((BATCH, None)))
        return cls(config, optimizer, TrainState(scalar, params, opt_state, key), batch)

    @property
    def shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, seed: int) -> TrainState:
        """A fresh state, created in place on its devices; the same values on any mesh."""

        def create(key) -> TrainState:
            params = init_params(self.config, key)
            return TrainState(jnp.int32(0), params, self.optimizer.init(params), key)

        return jax.jit(create, out_shardings=self.shardings)(jax.random.key(seed))

    def begin(self, params: Params, seed: int) -> TrainState:
        """A state of step 0 with these parameters, laid out as `abstract.params`; consumes them."""

        def create(params: Params, key) -> TrainState:
            return TrainState(jnp.int32(0), params, self.optimizer.init(params), key)

        jitted = jax.jit(create, donate_argnums=0, out_shardings=self.shardings)
        return jitted(params, jax.random.key(seed))

    def abstract_batch(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of one global batch: int32 [B, T] fields and the bool loss mask."""
        shape = (batch_size, seq_len)
        fields = ("tokens", "targets", "positions", "segment_ids")
        batch = {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.batch) for name in fields
        }
        batch["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=self.batch)
        return batch
