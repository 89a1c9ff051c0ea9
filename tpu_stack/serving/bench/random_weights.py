"""Random weights of a shape, packed as a bundle's would be: speed does not depend on the numbers.

Example:
    params = random_params(get_preset("qwen3_0_6b"), "int8", profile, mesh)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.weights import engine_weights
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile


def random_params(
    config: ModelConfig, format: str, profile: Profile, mesh: Mesh, seed: int = 0
) -> dict[str, Any]:
    """Normal weights with the standard deviation D**-0.5, in `format`, as an engine holds them.

    Raises UserError as `engine_weights` does.
    """
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def normal(spec: TensorSpec) -> jax.Array:
        return config.d_model**-0.5 * jax.random.normal(next(keys), spec.shape, jnp.float32)

    return engine_weights(config, normal, format, profile, mesh)
