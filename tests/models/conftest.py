"""Random weights for any configuration, from NumPy: JAX's generator takes seconds to compile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tpu_stack.models.abstract import map_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.axes import TensorSpec

Params = dict[str, Any]


@pytest.fixture(scope="session")
def random_params() -> Callable[..., Params]:
    """`random_params(config, seed=0)`: float32 weights that leave no parameter neutral.

    Norm scales start as the identity; here they are moved off it, for a forward pass that dropped
    one would go unnoticed. Queries and outputs are large, so that attention is not uniform.
    """

    def make(config: ModelConfig, seed: int = 0) -> Params:
        generator = np.random.default_rng(seed)

        def draw(spec: TensorSpec) -> np.ndarray:
            if spec.contract_axis is None:
                center = 0.0 if config.norm_offset else 1.0
                return generator.uniform(center - 0.5, center + 0.5, spec.shape).astype(np.float32)
            gain = 2.0 if spec.name.endswith(("wq", "wo")) else 1.0
            std = gain * spec.shape[spec.contract_axis] ** -0.5
            return (std * generator.standard_normal(spec.shape)).astype(np.float32)

        return map_specs(config, draw)

    return make
