"""A mixture of experts is one to the simulator too, not the dense model of one expert."""

import pytest

from tpu_stack.models.abstract import parameter_count, tensor_specs
from tpu_stack.models.flops import matmul_parameters
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.simulate.architecture import Architecture


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "mixtral_8x7b", "qwen3_8b"])
def test_the_simulator_counts_what_the_model_holds(name):
    config = get_preset(name)
    norms = sum(spec.size for spec in tensor_specs(config) if spec.name.endswith(".scale"))
    found = Architecture.of(config)
    assert found.total_parameters == parameter_count(config) - norms
    assert found.matmul_parameters == matmul_parameters(config)
