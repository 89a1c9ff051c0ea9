"""Where the training state lives: shapes and shardings of every leaf, without allocating any.

`of` is a decoder's; `of_params` any tree's.

    layout = StateLayout.of(config, optimizer, profile, mesh)
    state = layout.init(seed=0)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import init_params
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import Profile
from tpu_stack.sharding.rules import Rules
from tpu_stack.training.step import TrainState


@dataclass(frozen=True)
class StateLayout:
    """Abstract training state with the sharding of every leaf, and the sharding of a batch.

    `init_params` makes the parameters of a key; it is traced.
    """

    mesh: Mesh
    rules: Rules
    optimizer: optax.GradientTransformation
    init_params: Callable[[Any], Any]
    abstract: TrainState

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        optimizer: optax.GradientTransformation,
        profile: Profile,
        mesh: Mesh,
    ) -> "StateLayout":
        """A decoder's under `profile`. Raises UserError when a tensor does not divide."""
        profile.check(tensor_specs(config))
        rules = profile.rules

        def with_sharding(spec):
            sharding = NamedSharding(mesh, rules.partition_spec(spec.axes, spec.name))
            return jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)

        params = map_specs(config, with_sharding)
        return cls.of_params(params, partial(init_params, config), optimizer, mesh, rules)

    @classmethod
    def of_params(
        cls,
        params: Any,
        init_params: Callable[[Any], Any],
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        rules: Rules,
    ) -> "StateLayout":
        """That of any `params`: a tree of ShapeDtypeStructs with shardings on `mesh`.

        What the optimizer keeps for a parameter is laid out as the parameter, the rest replicated.
        """
        replicated = NamedSharding(mesh, PartitionSpec())

        def everywhere(leaf) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

        def like_param(leaf, param):
            if isinstance(leaf, optax.MaskedNode):  # another optimizer updates this parameter
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding)

        opt_state = optax.tree.map_params(
            optimizer,
            like_param,
            jax.eval_shape(optimizer.init, params),
            params,
            transform_non_params=everywhere,
            is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
        )
        small = jax.eval_shape(lambda: TrainState.first(None, None, jax.random.key(0)))
        step, key, finite = map(everywhere, (small.step, small.key, small.finite))
        state = TrainState(step, params, opt_state, key, finite)
        return cls(mesh, rules, optimizer, init_params, state)

    @property
    def shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def batch(self) -> NamedSharding:
        """How every leaf of a batch is laid out: its leading axis over the batch axes."""
        return NamedSharding(self.mesh, self.rules.partition_spec((BATCH,)))

    def init(self, seed: int) -> TrainState:
        """A fresh state, created in place on its devices; the same values on any mesh."""

        def create(key) -> TrainState:
            params = self.init_params(key)
            return TrainState.first(params, self.optimizer.init(params), key)

        return jax.jit(create, out_shardings=self.shardings)(jax.random.key(seed))

    def begin(self, params: Any, seed: int) -> TrainState:
        """A state of step 0 with these parameters, laid out as `abstract.params`; consumes them."""

        def create(params: Any, key) -> TrainState:
            return TrainState.first(params, self.optimizer.init(params), key)

        jitted = jax.jit(create, donate_argnums=0, out_shardings=self.shardings)
        return jitted(params, jax.random.key(seed))

    def abstract_batch(self, element_spec: Any) -> Any:
        """One global batch of these shapes and dtypes, with its sharding."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.batch), element_spec
        )
