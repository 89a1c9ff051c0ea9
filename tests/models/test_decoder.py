"""`forward` against the float64 reference, for every family and the odd corners between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import reference_logits

from tpu_stack.models.config import ModelConfig, RopeScaling
from tpu_stack.models.decoder import bind
from tpu_stack.models.decoder import forward as eager_forward
from tpu_stack.models.paged_cache import init_paged_cache

forward = jax.jit(eager_forward, static_argnums=0, static_argnames=("dtype", "remat", "unroll"))

LLAMA = ModelConfig(
    vocab_size=61,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=48,
    rope_base=10_000.0,
    # Wavelengths run from 6 to 6283 positions: all three regimes of the scaling are met.
    rope_scaling=RopeScaling("llama3", factor=8.0, original_max=64),
    norm_eps=1e-5,
)
QWEN3 = LLAMA.replace(
    rope_scaling=None, qk_norm=True, tie_embeddings=True, n_heads=6, head_dim=16, norm_eps=1e-6
)
GEMMA3 = ModelConfig(
    vocab_size=67,
    d_model=48,
    n_layers=4,
    n_heads=4,
    n_kv_heads=1,
    head_dim=16,
    d_ff=64,
    activation="gelu",
    block_pattern=("local", "local", "global"),
    window=5,
    rope_base=1_000_000.0,
    rope_base_local=10_000.0,
    rope_scaling=RopeScaling("linear", factor=8.0),
    qk_norm=True,
    post_norms=True,
    norm_offset=True,
    query_scale=24**-0.5,
    scale_embeddings=True,
    tie_embeddings=True,
)
GEMMA2 = GEMMA3.replace(
    qk_norm=False,
    block_pattern=("local", "global"),
    rope_base=10_000.0,
    rope_scaling=None,
    attention_softcap=5.0,
    logit_softcap=3.0,
    n_kv_heads=2,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "gemma2": GEMMA2,
    "ungated gelu": LLAMA.replace(gated_mlp=False, activation="gelu"),
    "ungated silu, every layer local": LLAMA.replace(
        gated_mlp=False, block_pattern=("local",), window=3, rope_scaling=None
    ),
    "window of one token": LLAMA.replace(block_pattern=("global", "local"), window=1),
    "one layer, one head of two": LLAMA.replace(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2),
    "untied, soft-capped": QWEN3.replace(tie_embeddings=False, logit_softcap=2.0),
    "linear scaling of global layers only": LLAMA.replace(
        rope_scaling=RopeScaling("linear", factor=4.0),
        block_pattern=("global", "local"),
        window=4,
        rope_base_local=100.0,
    ),
    "norm offset without post norms": QWEN3.replace(norm_offset=True, scale_embeddings=True),
}

# float32 rounds to 6e-8. Errors of the sums over D or F grow with their square root, and a few
# layers of norms and a softmax multiply them by less than 100: 1e-5 of the largest logit would do,
# 1e-4 is asked. A wrong mask, frequency or scale changes logits by 1e-2 and more.
TOLERANCE = 1e-4


def assert_close(found, wanted) -> None:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def tokens_of(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.vocab_size, shape, dtype=np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_reference(random_params, name):
    config = CONFIGS[name]
    params, tokens = random_params(config), tokens_of(config, 2, 13)
    found = forward(config, params, jnp.asarray(tokens))
    assert found.dtype == jnp.float32
    for row in range(2):
        assert_close(found[row], reference_logits(config, params, tokens[row].tolist()))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_spans_are_bidirectional(random_params, name):
    """Tokens of one span see each other, also past the window of 5; others stay causal."""
    config = CONFIGS[name]
    params, tokens = random_params(config), tokens_of(config, 2, 13)
    spans = np.array([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 2], [1] * 13], np.int32)
    found = eager_forward(config, params, jnp.asarray(tokens), spans_BT=jnp.asarray(spans))
    for row in range(2):
        wanted = reference_logits(config, params, tokens[row].tolist(), spans[row].tolist())
        assert_close(found[row], wanted)


def test_spans_and_a_cache_are_refused(random_params):
    params, positions = random_params(LLAMA), jnp.zeros((1, 1), jnp.int32)
    cache = init_paged_cache(LLAMA, 1, 16, jnp.zeros((1, 1), jnp.int32), "float32")
    with pytest.raises(ValueError, match="bidirectional spans need whole sequences"):
        bind(LLAMA, params).hidden(positions, positions, cache=cache, spans_BT=positions)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embeddings_in_place_of_ids(random_params, name):
    """What `embeddings` makes of ids gives their logits; other rows of it change them."""
    config = CONFIGS[name]
    params, tokens = random_params(config), jnp.asarray(tokens_of(config, 2, 7))
    embedded = bind(config, params).embeddings(tokens)
    wanted = np.asarray(forward(config, params, tokens))
    np.testing.assert_array_equal(forward(config, params, embedded), wanted)
    assert np.abs(forward(config, params, 1.5 * embedded) - wanted).max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3", "ungated silu, every layer local"])
def test_documents_in_a_row_are_alone(random_params, name):
    """Positions restart in each document and nothing is seen across: as if each were fed alone."""
    config = CONFIGS[name]
    params = random_params(config)
    lengths = [[7, 1, 6], [14]]
    tokens = tokens_of(config, 2, 14)
    positions = np.array([[t for n in row for t in range(n)] for row in lengths], np.int32)
    segments = np.array(
        [[d + 1 for d, n in enumerate(row) for _ in range(n)] for row in lengths], np.int32
    )
    found = np.asarray(forward(config, params, *map(jnp.asarray, (tokens, positions, segments))))
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            document = tokens[row, start : start + size].tolist()
            assert_close(
                found[row, start : start + size], reference_logits(config, params, document)
            )
            start += size


def test_scan_and_mask_are_causal(random_params):
    """Changing a token leaves every earlier logit as it was, bit for bit."""
    params = random_params(GEMMA3)
    tokens = jnp.asarray(tokens_of(GEMMA3, 1, 12))
    before = forward(GEMMA3, params, tokens)
    after = forward(GEMMA3, params, tokens.at[0, 8].add(1))
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).max() > 1e-2


def test_bfloat16_follows_float32(random_params):
    """Eight bits of mantissa: 2**-8 a rounding, some ten roundings deep; 5 % of the spread."""
    params, tokens = random_params(QWEN3), jnp.asarray(tokens_of(QWEN3, 2, 12))
    exact = forward(QWEN3, params, tokens)
    found = forward(QWEN3, params, tokens, dtype=jnp.bfloat16)
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


# LLVM's optimizations are half of a compilation, and not what is tested here.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def loss_and_gradients(params, tokens, **options):
    def loss(params):
        logits = eager_forward(LLAMA, params, tokens[:, :-1], **options)
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        )

    return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)


@pytest.fixture(scope="module")
def plain(random_params):
    """(params, tokens, loss, gradients) without rematerialization, one layer an iteration."""
    params, tokens = random_params(LLAMA), jnp.asarray(tokens_of(LLAMA, 2, 9))
    return params, tokens, *loss_and_gradients(params, tokens)


@pytest.mark.parametrize(("remat", "unroll"), [("dots", 2), ("full", 1)])
def test_remat_and_unroll_change_nothing(plain, remat, unroll):
    params, tokens, plain_value, plain_grads = plain
    value, grads = loss_and_gradients(params, tokens, remat=remat, unroll=unroll)
    # The same sums, which XLA may fuse otherwise: a few units in float32's last place.
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
