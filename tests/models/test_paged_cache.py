"""The paged cache against a pass without one and against float64, page by page, row by row."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_stack.kernels.kv_attention import reference_kv_attention
from tpu_stack.models.decoder import bind, forward, init_params
from tpu_stack.models.paged_attention import paged_attend
from tpu_stack.models.paged_cache import init_paged_cache
from tpu_stack.models.presets import get_preset

CONFIG = get_preset("nano").replace(
    vocab_size=97, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96
)
MIXED = CONFIG.replace(block_pattern=("local", "local", "global"), window=24)
PAGE, PAGES, ENTRIES = 16, 40, 12


def _tables(rows: int, seed: int = 0) -> jax.Array:
    """Distinct pages for each row, in no order."""
    pages = np.random.default_rng(seed).permutation(PAGES)[: rows * ENTRIES]
    return jnp.asarray(pages.reshape(rows, ENTRIES), jnp.int32)


def _paged(config, rows: int, dtype: str = "float32"):
    return init_paged_cache(config, PAGES, PAGE, _tables(rows), dtype)


def _run(config, params, cache, tokens, positions):
    model = bind(config, params)
    outputs = model.hidden(tokens, positions, cache=cache, dtype=jnp.float32)
    assert outputs.cache is not None
    return model.logits(outputs.hidden), outputs.cache


@pytest.mark.parametrize(
    "config",
    [pytest.param(CONFIG, id="global", marks=pytest.mark.slow), pytest.param(MIXED, id="mixed")],
)
def test_chunks_through_pages_equal_a_pass_without_a_cache(config):
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 150), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(150), (3, 150))
    want = jax.jit(forward, static_argnums=0)(config, params, tokens)
    paged, run = _paged(config, 3), jax.jit(_run, static_argnums=0)
    for start, stop in ((0, 64), (64, 128), (128, 149), (149, 150)):
        part = np.s_[:, start:stop]
        got, paged = run(config, params, paged, tokens[part], positions[part])
        np.testing.assert_allclose(got, want[part], atol=2e-5 * float(jnp.abs(want).max()))


def test_padding_writes_nothing_and_ragged_rows_do_not_touch_each_other():
    params = init_params(CONFIG, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, CONFIG.vocab_size)
    positions = jnp.stack([jnp.arange(32), jnp.where(jnp.arange(32) < 5, jnp.arange(32), -1)])
    _, cache = _run(CONFIG, params, _paged(CONFIG, 2), tokens, positions)
    written = np.asarray(jnp.any(cache.k != 0, axis=(0, 3))).reshape(CONFIG.n_layers, PAGES, PAGE)
    expected = np.zeros((PAGES, PAGE), bool)
    tables = np.asarray(_tables(2))
    expected[tables[0, :2]] = True
    expected[tables[1, 0], :5] = True
    chex.assert_trees_all_equal(written, np.broadcast_to(expected, written.shape))


def test_positions_beyond_the_table_are_dropped():
    cache = _paged(CONFIG, 1)
    ones = jnp.ones((1, 2, CONFIG.n_kv_heads, CONFIG.head_dim))
    positions = jnp.array([[ENTRIES * PAGE - 1, ENTRIES * PAGE]])
    written = cache.write(jnp.int32(1), positions, ones, ones).k
    assert int(jnp.sum(jnp.any(written != 0, axis=(0, 3)))) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 5.0)])
def test_attention_over_pages_matches_float64(dtype, window, softcap):
    """The cache's own rounding is in both: what is compared is the attention over it.

    float32 products accumulate about sqrt(H + S) rounding errors of 2**-24 each: 1e-5 is ten times
    that.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 16, 100, 192])
    config = CONFIG.replace(n_heads=4, n_kv_heads=2)
    tables = jnp.asarray(rng.integers(0, PAGES, (5, ENTRIES)), jnp.int32)
    cache = init_paged_cache(config, PAGES, PAGE, tables, dtype)
    shape = (5, 192, config.n_kv_heads, config.head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(192), (5, 192))
    for layer in range(config.n_layers):
        cache = cache.write(jnp.int32(layer), positions, k + layer, v - layer)
    q = jnp.asarray(rng.normal(size=(5, config.n_heads, config.head_dim)), jnp.float32)
    scales: Any = None if cache.k_scales is None else (cache.k_scales, cache.v_scales)
    shifted = tables + 2 * PAGES
    got = paged_attend(
        q[:, None],
        (cache.k, cache.v),
        scales,
        shifted,
        jnp.asarray(lengths - 1)[:, None],
        window,
        scale=0.3,
        softcap=softcap,
    )[:, 0]
    want = reference_kv_attention(
        *(q, cache.k, cache.v, shifted, lengths, cache.k_scales, cache.v_scales),
        window=window,
        softcap=softcap,
        scale=0.3,
    )
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1e-5)


def test_int8_pages_keep_two_and_a_half_digits():
    """Rounding to a 127th of the largest is off by at most a 254th of it."""
    cache = _paged(CONFIG, 1, "int8")
    k = jax.random.normal(jax.random.key(0), (1, 32, CONFIG.n_kv_heads, CONFIG.head_dim))
    cache = cache.write(jnp.int32(0), jnp.arange(32)[None], k, k)
    assert cache.k_scales is not None
    pages = cache.tables[0, :2]
    stored = cache.k[:, pages].astype(jnp.float32) * cache.k_scales[:, pages, 0][..., None]
    stored = jnp.moveaxis(stored.reshape(CONFIG.n_kv_heads, 32, -1), 0, 1)
    bound = jnp.max(jnp.abs(k[0]), axis=-1, keepdims=True) / 254
    assert bool(jnp.all(jnp.abs(stored - k[0]) <= bound * 1.0001))


def test_a_row_is_the_same_bits_beside_any_neighbours():
    """Longer neighbours lengthen the walk over blocks; what lies out of sight adds exactly 0."""
    rng = np.random.default_rng(0)
    shape = (CONFIG.n_kv_heads, PAGES, PAGE, CONFIG.head_dim)
    pages = (jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape)))
    q = jnp.asarray(rng.normal(size=(3, 1, 4, CONFIG.head_dim)), jnp.float32)
    how = {"scale": 0.25, "softcap": None}
    run = jax.jit(
        lambda positions: paged_attend(q, pages, None, _tables(3), positions, None, **how)
    )
    alone = run(jnp.array([[37], [-1], [-1]]))
    mixed = run(jnp.array([[37], [191], [150]]))
    chex.assert_trees_all_equal(alone[0], mixed[0])
    assert not bool(jnp.any(alone[1:]))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
def test_the_tpu_compiler_copies_no_cache():
    """Heads in the scatter's window cost two copies of the cache per layer; now nothing near it."""
    script = Path(__file__).parent / "compile_paged_decode.py"
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["temporaries"] < found["cache"] / 20


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra [aot]")
@pytest.mark.parametrize(
    ("how", "devices"),
    [
        ("split", 4),
        pytest.param("split", 1, marks=pytest.mark.slow),
        pytest.param("stacked", 1, marks=pytest.mark.slow),
    ],
)
def test_the_tpu_compiler_copies_no_weight_of_a_split_layer(how, devices):
    """A scan slices and copies every weight before a kernel reads it: three times the traffic.
    On a mesh every device runs the kernel too, on its part."""
    script = Path(__file__).parent / "compile_int8_decode.py"
    run = subprocess.run(
        [sys.executable, script, how, str(devices)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kernels"] > 0
    assert bool(found["copies"]) == (how == "stacked")
