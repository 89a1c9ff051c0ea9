"""Presets hold what was published; abstract tensors cost nothing and tell the truth."""

import json

import jax
import pytest

from tpu_stack.errors import UserError
from tpu_stack.models import abstract, decoder
from tpu_stack.models.abstract import map_specs, parameter_count, tensor_specs
from tpu_stack.models.config import ModelConfig, RopeScaling
from tpu_stack.models.decoder import init_params
from tpu_stack.models.presets import PRESETS, get_preset

# Counted from the safetensors headers of the published checkpoints (text towers only).
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "gemma3_1b": 999_885_952,
    "gemma3_27b": 27_009_346_304,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
}
SMALL = ModelConfig(
    vocab_size=32, d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=24
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert parameter_count(get_preset(name)) == PUBLISHED[name]


def test_every_preset_is_counted_or_nano():
    assert set(PRESETS) == {"nano", *PUBLISHED}
    assert parameter_count(get_preset("nano")) < 5_000_000


def test_layer_kinds_repeat_and_are_cut():
    kinds = get_preset("gemma3_1b").layer_kinds
    assert len(kinds) == 26
    assert [i for i, kind in enumerate(kinds) if kind == "global"] == [5, 11, 17, 23]


def test_specs_of_70b_allocate_nothing():
    tensor_specs.cache_clear()
    decoder.abstract_model.cache_clear()
    before = {id(array) for array in jax.live_arrays()}
    specs = tensor_specs(get_preset("llama3_70b"))
    created = [array for array in jax.live_arrays() if id(array) not in before]
    assert sum(spec.size for spec in specs) == PUBLISHED["llama3_70b"]
    assert sum(array.nbytes for array in created) < 1024  # a PRNG key at most


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "qk_norm": True},
        {"gated_mlp": False, "post_norms": True, "norm_offset": True},
    ],
)
def test_specs_are_what_init_makes(changes):
    """Names, order, shapes and dtypes of `tensor_specs` are those of the parameter tree."""
    config = SMALL.replace(**changes)
    real = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    leaves = jax.tree_util.tree_flatten_with_path(real)[0]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, str(leaf.dtype))
        for path, leaf in leaves
    }
    assert named == {spec.name: (spec.shape, spec.dtype) for spec in tensor_specs(config)}
    assert jax.tree.structure(real) == jax.tree.structure(map_specs(config, lambda spec: spec.name))


def test_contract_axes_and_granules():
    """A matmul weight contracts its second-last axis, the table its last; heads stay whole."""
    config = get_preset("llama3_8b")
    by_name = {spec.name: spec for spec in abstract.tensor_specs(config)}
    assert by_name["embed"].contract_axis == -1
    assert by_name["final_norm.scale"].contract_axis is None
    assert by_name["blocks.attention_norm.scale"].contract_axis is None
    assert by_name["blocks.attention.wk"].granules == (1, 1, 128)
    assert by_name["blocks.attention.wo"].granules == (1, 128, 1)
    matrices = [s for s in by_name.values() if s.contract_axis == -2]
    assert len(matrices) == 8  # q k v o gate up down unembed


def test_initialization_has_unit_scale():
    """Hidden states of a fresh model have a root mean square near 1 at every width."""
    config = SMALL.replace(vocab_size=4096, n_layers=1)
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    init = jax.jit(init_params, static_argnums=0, compiler_options=quick)
    params = init(config, jax.random.key(1))
    assert float(params["embed"].std()) == pytest.approx(1.0, rel=0.02)  # 65,536 draws: 0.3 %
    assert float(params["unembed"].std()) == pytest.approx(16**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "model.vocab_size is 0"),
        ({"d_model": -3}, "model.d_model is -3"),
        ({"n_layers": 0}, "model.n_layers"),
        ({"window": 0}, "model.window"),
        ({"n_heads": 3, "n_kv_heads": 2}, "n_heads 3 is not a multiple of n_kv_heads 2"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"block_pattern": ()}, "block_pattern is empty"),
    ],
)
def test_config_errors_name_the_field(changes, said):
    with pytest.raises(UserError, match=said):
        SMALL.replace(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name):
    config = get_preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_survives_json_with_rope_scaling():
    config = SMALL.replace(rope_scaling=RopeScaling("linear", 4.0), block_pattern=("local",))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_of_a_newer_version_is_refused():
    with pytest.raises(UserError, match="experts"):
        ModelConfig.from_dict({**SMALL.to_dict(), "experts": 8})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="perhaps 'llama3_8b'"):
        get_preset("lama3_8b")
    with pytest.raises(UserError, match="one of nano"):
        get_preset("zzz")
