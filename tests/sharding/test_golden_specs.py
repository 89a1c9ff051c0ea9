"""Where every tensor of three models lives under both profiles, written out by hand.

A change of a rule, a logical axis or a weight's layout shows up here as a line in a diff.
"""

import pytest
from jax.sharding import PartitionSpec as P

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.sharding.profiles import get_profile

# tensor: (under 8t, mesh data x fsdp x tensor; under 8i, mesh data x tensor)
LLAMA3_8B = {
    "embed": (P("tensor", "fsdp"), P("tensor", None)),
    "blocks.attention_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention.wq": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wk": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wv": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wo": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "blocks.mlp_norm.scale": (P(None, None), P(None, None)),
    "blocks.mlp.w_gate": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_up": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_down": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "final_norm.scale": (P(None), P(None)),
    "unembed": (P("fsdp", "tensor"), P(None, "tensor")),
}
GEMMA3_1B = {
    "embed": (P("tensor", "fsdp"), P("tensor", None)),
    "blocks.attention_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention.wq": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wk": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wv": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wo": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "blocks.attention.q_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention.k_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention_post_norm.scale": (P(None, None), P(None, None)),
    "blocks.mlp_norm.scale": (P(None, None), P(None, None)),
    "blocks.mlp.w_gate": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_up": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_down": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "blocks.mlp_post_norm.scale": (P(None, None), P(None, None)),
    "final_norm.scale": (P(None), P(None)),
}
NANO = {
    "embed": (P("tensor", "fsdp"), P("tensor", None)),
    "blocks.attention_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention.wq": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wk": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wv": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.attention.wo": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "blocks.attention.q_norm.scale": (P(None, None), P(None, None)),
    "blocks.attention.k_norm.scale": (P(None, None), P(None, None)),
    "blocks.mlp_norm.scale": (P(None, None), P(None, None)),
    "blocks.mlp.w_gate": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_up": (P(None, "fsdp", "tensor"), P(None, None, "tensor")),
    "blocks.mlp.w_down": (P(None, "tensor", "fsdp"), P(None, "tensor", None)),
    "final_norm.scale": (P(None), P(None)),
}
GOLDEN = {"llama3_8b": LLAMA3_8B, "gemma3_1b": GEMMA3_1B, "nano": NANO}


@pytest.mark.parametrize(("column", "profile"), [(0, "8t"), (1, "8i")])
@pytest.mark.parametrize("model", GOLDEN)
def test_every_spec(model, column, profile):
    rules = get_profile(profile).rules
    found = {
        spec.name: rules.partition_spec(spec.axes, spec.name)
        for spec in tensor_specs(get_preset(model))
    }
    assert found == {name: specs[column] for name, specs in GOLDEN[model].items()}


@pytest.mark.parametrize("text", ["8t:4x4x4", "8i:4"])
def test_llama3_8b_divides_over_its_usual_meshes(text):
    get_profile(text).check(tensor_specs(get_preset("llama3_8b")))
