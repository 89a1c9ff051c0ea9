"""Schedules by formula, clipping, weight decay by tensor, and Muon matrix by matrix."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import map_specs, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import OptimizerConfig, TrainConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.optimizer import make_optimizer, make_schedule

MODEL = ModelConfig(
    vocab_size=16, d_model=8, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=24
)
PEAK = 1e-2


def schedule_values(steps: int = 100, **train) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **train), steps)
    return np.array([np.asarray(schedule(step)) for step in range(110)])


def test_warm_up_is_linear_and_constant_after():
    """Step n of a warm-up of 10 has n tenths of the peak, counted from 1: the first step moves."""
    values = schedule_values(warmup_steps=10)
    np.testing.assert_allclose(values[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(values[10:], PEAK, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warm_up(warmup):
    np.testing.assert_allclose(schedule_values(warmup_steps=warmup), PEAK, rtol=1e-6)


def test_a_constant_schedule_does_not_know_how_long_it_runs():
    """Lengthening a run must not change the steps already made, however short it was at first."""
    for steps in (5, 20, 100):
        np.testing.assert_array_equal(
            schedule_values(steps, warmup_steps=20), schedule_values(1000, warmup_steps=20)
        )


@pytest.mark.parametrize(
    ("decay_steps", "end"), [(0, 100), (60, 60)], ids=["to the last step", "earlier"]
)
def test_linear_decay(decay_steps, end):
    values = schedule_values(
        schedule="linear", warmup_steps=10, decay_steps=decay_steps, final_lr_ratio=0.2
    )
    left = np.clip((end - np.arange(10, 110)) / (end - 10), 0, 1)
    np.testing.assert_allclose(values[10:], PEAK * (0.2 + 0.8 * left), rtol=1e-5)


def test_cosine_decay():
    values = schedule_values(schedule="cosine", warmup_steps=10, final_lr_ratio=0.1)
    done = np.clip((np.arange(10, 110) - 10) / 90, 0, 1)
    np.testing.assert_allclose(
        values[10:], PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2), rtol=1e-4
    )


def test_a_decay_shorter_than_its_warm_up_still_ends():
    values = schedule_values(steps=5, schedule="linear", warmup_steps=20, final_lr_ratio=0.0)
    assert values[4] == pytest.approx(PEAK)
    assert values[10] == 0.0


def random_tree(seed: int, size: float = 1.0) -> dict:
    generator = np.random.default_rng(seed)
    return map_specs(
        MODEL, lambda spec: (size * generator.standard_normal(spec.shape)).astype(np.float32)
    )


def leaf(tree: Any, name: str) -> np.ndarray:
    for key in name.split("."):
        tree = tree[key]
    return tree


def first_updates(params: dict, grads: dict, **train) -> dict[str, np.ndarray]:
    """Updates of the first step, by tensor name."""
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=PEAK, warmup_steps=0, **train), 200, MODEL
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    flat = jax.tree_util.tree_flatten_with_path(updates)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in flat
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_reaches_matrices_only(optimizer):
    """With zero gradients what moves is decay: -lr * 0.1 * w for matrices, nothing for norms."""
    params, zeros = random_tree(0), random_tree(0, 0.0)
    updates = first_updates(params, zeros, optimizer=optimizer, weight_decay=0.1)
    for spec in tensor_specs(MODEL):
        value = leaf(params, spec.name)
        decay = -PEAK * 0.1 * value if spec.contract_axis is not None else np.zeros_like(value)
        np.testing.assert_allclose(updates[spec.name], decay, rtol=1e-5, atol=1e-12)


def test_clipping_is_by_the_norm_of_all_gradients():
    """Past the norm only the direction counts; under it nothing changes. Read off the moments."""
    grads = random_tree(1)
    norm = float(optax.tree.norm(grads))

    def moments(clip: float, size: float):
        optimizer = make_optimizer(OptimizerConfig(clip_norm=clip, warmup_steps=0), 200, MODEL)
        state = optimizer.init(grads)
        scaled = jax.tree.map(lambda g: size * g, grads)
        _, state = optimizer.update(scaled, state, grads)
        return float(optax.tree.norm(optax.tree.get(state, "mu"))) / 0.1  # mu = (1 - b1) * g

    assert moments(1.0, 1.0) == pytest.approx(1.0, rel=1e-5)
    assert moments(1.0, 50.0) == pytest.approx(1.0, rel=1e-5)
    assert moments(2 * norm, 1.0) == pytest.approx(norm, rel=1e-5)
    assert moments(0.0, 50.0) == pytest.approx(50 * norm, rel=1e-5)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Jordan 2024's quintic iteration in float64: nearly U V^T of the matrix U S V^T."""
    wide = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if wide else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if wide else x


def test_muon_orthogonalizes_each_layer_by_itself():
    params, grads = random_tree(2), random_tree(3)
    options = {"weight_decay": 0.0, "clip_norm": 0.0}
    updates = first_updates(params, grads, optimizer="muon", **options)
    plain = first_updates(params, grads, optimizer="adamw", **options)
    for spec in tensor_specs(MODEL):
        found = updates[spec.name]
        if not spec.name.startswith("blocks.") or spec.contract_axis is None:
            np.testing.assert_array_equal(found, plain[spec.name])  # AdamW's, exactly
            continue
        grad = leaf(grads, spec.name)
        size = -PEAK * 0.2 * max(spec.shape[-2:]) ** 0.5
        for layer in range(MODEL.n_layers):
            wanted = size * newton_schulz(grad[layer].astype(np.float64))
            # float32 through five iterations that enlarge small singular values up to 480 times.
            np.testing.assert_allclose(found[layer], wanted, atol=1e-4 * abs(size))
            values = np.linalg.svd(found[layer] / size, compute_uv=False)
            assert values.min() > 0.3  # 5 iterations bring every singular value near 1
            assert values.max() < 1.3


def test_muon_steps_are_as_large_as_adamw_s():
    """Root mean square 0.2 learning rates for every shape (Liu et al. 2025), give or take."""
    grads = random_tree(3)
    updates = first_updates(grads, grads, optimizer="muon", weight_decay=0.0)
    for spec in tensor_specs(MODEL):
        if spec.name.startswith("blocks.") and spec.contract_axis is not None:
            rms = float(np.sqrt(np.mean(np.square(updates[spec.name])))) / PEAK
            assert rms == pytest.approx(0.2, rel=0.35)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_state_lies_where_its_parameter_lies(optimizer):
    """Moments carry the sharding of their tensor; only scalars and coefficients are replicated."""
    profile = get_profile("8t").with_mesh("data=2,fsdp=2,tensor=1")
    rule = make_optimizer(OptimizerConfig(optimizer=optimizer), 200, MODEL)
    layout = StateLayout.of(MODEL, rule, profile, make_mesh(profile.mesh))
    specs = {spec.name: spec for spec in tensor_specs(MODEL)}
    counted = dict.fromkeys(specs, 0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(layout.abstract.opt_state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        match = next((n for n in specs if name.endswith("." + n)), None)
        if match is None:
            assert leaf.size <= 3  # counts, and Muon's three coefficients
            assert leaf.sharding.is_fully_replicated
            continue
        counted[match] += 1
        assert leaf.shape == specs[match].shape
        assert leaf.sharding.spec == profile.rules.partition_spec(specs[match].axes)
    for name, spec in specs.items():
        hidden = name.startswith("blocks.") and spec.contract_axis is not None
        assert counted[name] == (1 if optimizer == "muon" and hidden else 2), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "^steps is 0"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"log_every": True}, "log_every is True; it must be a whole number"),
        ({"learning_rate": "3e-3"}, "learning_rate is '3e-3'; it must be a number"),
        ({"batch_size": 12, "accumulate": 5}, "batch_size 12 is not a multiple"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"compute_dtype": "float16"}, "float16"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; adamw, muon would do"),
        ({"schedule": "coz"}, "schedule is 'coz'; constant, cosine, linear would do"),
        ({"remat": "foo"}, "remat is 'foo'; none, dots, full would do"),
        ({"b1": 5.0}, "b1 is 5.0; it must be below 1"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"clip_norm": -0.5}, "clip_norm is -0.5"),
    ],
)
def test_config_errors_name_the_field(options, said):
    with pytest.raises(UserError, match=said):
        TrainConfig(**options)
