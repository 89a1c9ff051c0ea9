"""Mixture of experts: against a plain loop over tokens, over meshes, packed, and in training."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import bind, forward, init_params
from tpu_stack.models.flops import matmul_parameters
from tpu_stack.models.moe import MoE, balance_loss, choose, route
from tpu_stack.models.presets import get_preset
from tpu_stack.quant import quantize
from tpu_stack.quant.grouped import grouped_matmul
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.losses import NextTokenLoss
from tpu_stack.training.step import make_train_step

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    n_experts=4,
    experts_per_token=2,
    d_ff_shared=16,
    balance_loss=0.01,
)
SIZES = ([3, 0, 9, 5], [0, 0, 0, 17], [17, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])
TOLERANCE = 1e-5
"""Relative to the largest: float32 sums of at most 64 terms in another order."""


def assert_near(found, wanted, tolerance=TOLERANCE):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-9)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def expected_product(x, w, sizes) -> np.ndarray:
    """One row after the other in float64."""
    expert = np.repeat(np.arange(len(sizes)), sizes)
    out = np.zeros((len(x), w.shape[-1]))
    for row, e in enumerate(expert):
        out[row] = x[row].astype(np.float64) @ w[e].astype(np.float64)
    return out


@pytest.mark.parametrize("sizes", SIZES)
def test_the_grouped_product(sizes):
    x, w = draw(17, 32), draw(4, 32, 24, seed=1)
    found = jax.jit(grouped_matmul)(x, w, jnp.asarray(sizes, jnp.int32))
    assert_near(found, expected_product(x, w, sizes))


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_the_gradients_of_the_grouped_product(sizes):
    x, w, g = draw(17, 32), draw(4, 32, 24, seed=1), draw(17, 24, seed=2)
    sizes_E = jnp.asarray(sizes, jnp.int32)
    _, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E), x, w)
    dx, dw = back(jnp.asarray(g))
    assert_near(dx, expected_product(g, w.transpose(0, 2, 1), sizes))
    expert, wanted = np.repeat(np.arange(4), sizes), np.zeros(w.shape)
    for row, e in enumerate(expert):
        wanted[e] += np.outer(x[row], g[row])
    assert_near(dw, wanted)


@pytest.mark.parametrize("format", ["int8", "int4", "nvfp4", "int2"])
def test_packed_experts_are_what_they_stand_for(format):
    x, w, sizes = draw(17, 64), draw(4, 64, 32, seed=1), SIZES[0]
    packed = quantize(jnp.asarray(w), format)
    wide = np.asarray(packed.dequantize())
    found = jax.jit(grouped_matmul)(x, packed.widen(), jnp.asarray(sizes, jnp.int32))
    assert_near(found, expected_product(x, wide, sizes))


def test_a_rotated_expert_is_what_it_stands_for():
    x, w = draw(17, 64), draw(4, 64, 32, seed=1)
    packed = quantize(jnp.asarray(w), "int4", rotation=32)
    found = grouped_matmul(jnp.asarray(x), packed, jnp.asarray(SIZES[0], jnp.int32))
    assert_near(found, expected_product(x, np.asarray(packed.dequantize()), SIZES[0]))


def expected_layer(params, x_MD: np.ndarray) -> np.ndarray:
    """One layer's output token by token in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items() if name != "shared"}
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    out = np.zeros(x_MD.shape)
    for row, x in enumerate(x_MD.astype(np.float64)):
        scores = np.exp(x @ p["router"])
        scores /= scores.sum()
        best = np.argsort(-scores)[: CONFIG.experts_per_token]
        for e in best:
            hidden = silu(x @ p["w_gate"][e]) * (x @ p["w_up"][e])
            out[row] += scores[e] / scores[best].sum() * (hidden @ p["w_down"][e])
    shared = {name: np.asarray(leaf, np.float64) for name, leaf in params["shared"].items()}
    x = x_MD.astype(np.float64)
    return out + (silu(x @ shared["w_gate"]) * (x @ shared["w_up"])) @ shared["w_down"]


def layer_of(params):
    graph, _ = nnx.split(nnx.eval_shape(lambda: MoE(CONFIG, nnx.Rngs(params=0))))
    return nnx.merge(graph, params)


def first_layer(params):
    return jax.tree.map(lambda leaf: leaf[0], params["blocks"]["mlp"])


def test_a_layer_is_the_sum_of_its_tokens_experts():
    params = first_layer(init_params(CONFIG, jax.random.key(0)))
    x = draw(2, 9, CONFIG.d_model)
    found, _ = layer_of(params)(jnp.asarray(x))
    wanted = expected_layer(params, x.reshape(-1, CONFIG.d_model))
    assert_near(found, wanted.reshape(found.shape))


def test_a_token_does_not_depend_on_the_others():
    """Bit for bit, at a decoding batch's shape: nothing is dropped, and rows do not mix."""
    params = first_layer(init_params(CONFIG, jax.random.key(0)))
    layer = jax.jit(lambda x: layer_of(params)(x)[0])
    x = draw(8, 1, CONFIG.d_model)
    together = np.asarray(layer(x))
    for row in range(8):
        others = draw(8, 1, CONFIG.d_model, seed=row + 1)
        others[row] = x[row]
        np.testing.assert_array_equal(np.asarray(layer(others))[row], together[row])
        crowded = np.repeat(x[row : row + 1], 8, axis=0)  # all to the same experts
        np.testing.assert_array_equal(np.asarray(layer(crowded))[row], together[row])


def test_the_balance_loss():
    """k when tokens and probabilities are even; E when all goes to one expert."""
    even = jnp.full((1, 4, 4), 0.25)
    assert float(balance_loss(even, jnp.asarray([[[0, 1], [2, 3], [0, 1], [2, 3]]]))) == 2.0
    one = jnp.zeros((1, 4, 4)).at[..., 0].set(1.0)
    assert float(balance_loss(one, jnp.zeros((1, 4, 1), jnp.int32))) == 4.0


def test_shares_are_a_softmax_over_the_chosen():
    x, router = jnp.asarray(draw(1, 5, 32)), jnp.asarray(draw(32, 4, seed=1))
    shares, experts = choose(CONFIG, route(x, router))
    logits = np.take_along_axis(x @ router, np.asarray(experts), -1)  # pyright: ignore
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_near(shares, wanted)
    plain, _ = choose(CONFIG.replace(normalize_experts=False), route(x, router))
    assert (np.asarray(plain.sum(-1)) < 1).all()


MESHES = ["data=2,expert=2,tensor=2", "fsdp=2,expert=4"]


def objective(params, tokens):
    model = bind(CONFIG, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    outputs = model.hidden(tokens, positions)
    logits = model.logits(outputs.hidden)
    return jnp.mean(jax.nn.logsumexp(logits, -1)) + outputs.aux["balance_loss"], logits


with_gradients = jax.value_and_grad(objective, has_aux=True)


@pytest.fixture(scope="module")
def alone():
    """Parameters, tokens, and what one device makes of them."""
    params = init_params(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (4, 12))
    return params, tokens, jax.jit(with_gradients)(params, tokens)


@pytest.mark.parametrize(
    "mesh_text", [*MESHES[:1], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[1:])]
)
def test_a_mesh_changes_neither_logits_nor_gradients(alone, mesh_text):
    params, tokens, ((loss, logits), grads) = alone
    profile = get_profile("8t").with_mesh(mesh_text)
    mesh = make_mesh(profile.mesh)
    layout = StateLayout.of(CONFIG, optax.sgd(0.1), profile, mesh)
    with sharding_scope(mesh, profile.rules):
        placed = jax.device_put(params, layout.shardings.params)
        batch = jax.device_put(tokens, layout.batch)
        (loss2, logits2), grads2 = jax.jit(lambda *a: with_gradients(*a))(placed, batch)
    assert_near(loss2, loss)
    assert_near(logits2, logits)
    for one, other in zip(jax.tree.leaves(grads2), jax.tree.leaves(grads), strict=True):
        assert_near(
            one, other, 10 * TOLERANCE
        )  # a backward pass rounds twice as often, and cancels


def test_experts_are_split_over_their_axis():
    profile = get_profile("8i").with_mesh("expert=4,tensor=2")
    specs = {spec.name: spec for spec in tensor_specs(CONFIG)}
    place = lambda name: tuple(profile.rules.partition_spec(specs[name].axes))  # noqa: E731
    assert place("blocks.mlp.w_up") == (None, "expert", None, "tensor")
    assert place("blocks.mlp.w_down") == (None, "expert", "tensor", None)
    assert place("blocks.mlp.router") == (None, None, None)
    with pytest.raises(UserError, match=r"axis 'expert' has 4 parts"):
        get_profile("8i").with_mesh("expert=8").check(tensor_specs(CONFIG))
    assert "expert" not in get_profile("8i").with_mesh("tensor=8").mesh


def test_packed_on_a_mesh_is_packed_on_one_device():
    params = init_params(CONFIG, jax.random.key(0))
    params["blocks"]["mlp"] = {
        name: quantize(leaf, "int8").widen() if name.startswith("w_") else leaf
        for name, leaf in params["blocks"]["mlp"].items()
    }
    tokens = np.random.default_rng(0).integers(0, 64, (4, 6))
    alone = jax.jit(partial(forward, CONFIG))(params, tokens)
    profile = get_profile("8i").with_mesh("data=2,expert=2,tensor=2")
    with sharding_scope(make_mesh(profile.mesh), profile.rules):
        spread = jax.jit(lambda *a: forward(CONFIG, *a))(params, tokens)
    assert_near(spread, alone)


def test_flops_count_the_experts_that_a_token_meets():
    dense = CONFIG.replace(n_experts=0, experts_per_token=0, d_ff_shared=0)
    one_expert = 3 * CONFIG.n_layers * CONFIG.d_model * CONFIG.d_ff
    shared = 3 * CONFIG.n_layers * CONFIG.d_model * CONFIG.d_ff_shared
    router = CONFIG.n_layers * CONFIG.d_model * CONFIG.n_experts
    assert matmul_parameters(CONFIG) == matmul_parameters(dense) + one_expert + shared + router


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("qwen3_30b_a3b", 30.5e9, 3.3e9), ("mixtral_8x7b", 46.7e9, 12.9e9)],
)
def test_presets_have_the_published_sizes(name, total, active):
    """Model cards: Qwen3-30B-A3B 30.5B and 3.3B active; Mixtral 8x7B 46.7B and 12.9B active."""
    config = get_preset(name)
    specs = tensor_specs(config)
    lookup = config.vocab_size * config.d_model
    assert sum(spec.size for spec in specs) == pytest.approx(total, rel=0.005)
    assert matmul_parameters(config) + lookup == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"experts_per_token": 5},
        {"experts_per_token": 0},
        {"n_experts": 0},
        {"balance_loss": -1.0},
        {"gated_mlp": False},
    ],
)
def test_impossible_mixtures_are_refused(changes):
    with pytest.raises(UserError, match=r"model\."):
        replace(CONFIG, **changes)


@pytest.mark.slow
def test_experts_train_in_bfloat16_on_a_mesh():
    """The usual training step: master weights in float32, products in bfloat16, recomputed."""
    config = CONFIG.replace(n_layers=1, balance_loss=1.0)
    profile = get_profile("8t").with_mesh("fsdp=2,expert=2,tensor=2")
    mesh, optimizer = make_mesh(profile.mesh), optax.adam(3e-2)
    layout = StateLayout.of(config, optimizer, profile, mesh)
    ids = np.random.default_rng(0).integers(0, 64, (8, 17))
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.broadcast_to(np.arange(16), (8, 16)),
        "segment_ids": np.ones((8, 16), np.int32),
        "loss_mask": np.ones((8, 16), bool),
    }
    loss = NextTokenLoss(config, jnp.bfloat16, "full")
    step = make_train_step(loss, optimizer, accumulate=2)
    with sharding_scope(mesh, profile.rules):
        jitted = jax.jit(step, out_shardings=(layout.shardings, None))
        state, batch = layout.init(0), jax.device_put(batch, layout.batch)
        losses = []
        for _ in range(12):
            state, metrics = jitted(state, (), batch)
            losses.append(float(metrics["loss"]))
    router = state.params["blocks"]["mlp"]["router"]
    assert router.dtype == jnp.float32
    assert abs(losses[0] - np.log(64)) < 1.0  # the balance loss, at least 2, is not in it
    assert losses[-1] < losses[0] - 1.0
    assert np.isfinite(np.asarray(router)).all()
