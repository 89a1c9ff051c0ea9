"""Decode attention over pages, interpreted, against float64."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tpu_stack.kernels.kv_attention import kv_attention, make_plan, reference_kv_attention
from tpu_stack.kernels.kv_attention import plan as planning

TOLERANCE = {"bfloat16": 2 * 2.0**-8, "float32": 1e-5}
"""Relative Frobenius error. In bfloat16 the weights, the result and, where it is no bfloat16
already, a page's element are rounded, by 2**-9 rms each at most; in float32 sums of at most 200
terms and exp and tanh, each right to a few 2**-24, remain."""


def operands(dtype="bfloat16", q_dtype="bfloat16", n=4, k=2, h=32, page=16, table=5, lengths=None):
    """Random arguments; pages in random order, unused memory and table entries poisoned."""
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 37, 80, 16, 33] if lengths is None else lengths, np.int32)
    batch, count = len(lengths), len(lengths) * table + 1
    pages = []
    for _ in range(2):
        if dtype == "int8":
            pages.append(rng.integers(-127, 128, (k, count, page, h)).astype(np.int8))
        else:
            pages.append(rng.normal(size=(k, count, page, h)).astype(jnp.dtype(dtype)))
    scales = [rng.uniform(0.001, 0.02, (k, count, 1, page)).astype("f4") for _ in range(2)]
    order = rng.permutation(count - 1)[: batch * table].reshape(batch, table).astype(np.int32)
    for b, length in enumerate(lengths):
        for i in range(table):
            used = int(np.clip(length - i * page, 0, page))
            for array in (*pages, *scales):
                if array.dtype != np.int8:
                    (array[:, order[b, i], 0] if array.shape[2] == 1 else array[:, order[b, i]])[
                        :, used:
                    ] = np.nan
            if not used:
                order[b, i] = -(10**6)
    q = jnp.asarray(rng.normal(size=(batch, n, h)), q_dtype)
    rest = [jnp.asarray(a) for a in (*pages, order, lengths)]
    return [q, *rest, *([jnp.asarray(s) for s in scales] if dtype == "int8" else [])]


def check(arguments, interpret=None, tiles=None, **options):
    """The result is within tolerance of float64, and zero where a sequence is empty."""
    got = kv_attention(*arguments, **options, interpret=interpret, tiles=tiles)
    want = reference_kv_attention(*arguments, **options)
    assert got.dtype == arguments[0].dtype
    got = np.asarray(got).astype(np.float64)
    assert not got[np.asarray(arguments[4]) == 0].any()
    assert np.linalg.norm(got - want) <= TOLERANCE[arguments[0].dtype.name] * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("q_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", [{"scale": 0.3}, {"window": 20, "softcap": 2.0}], ids=str)
def test_ragged_lengths(dtype, q_dtype, options):
    check(operands(dtype, q_dtype), tiles=(2, 1), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_pages_of_whole_tiles_are_waited_for_at_once(dtype):
    arguments = operands(dtype, h=128, page=128, table=3, lengths=[0, 384, 256, 130])
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(arguments, interpret=params, tiles=(2, 1))


@pytest.mark.parametrize("batch", [6, 3])
def test_two_cores_share_the_sequences(batch, monkeypatch):
    monkeypatch.setattr(planning, "device_kind", lambda: "TPU v5p")
    arguments = operands(lengths=[33, 0, 80, 16, 37, 1][:batch])
    assert make_plan(*arguments, tiles=(2, 1)).grid[:2] == ((2, 3) if batch == 6 else (1, 3))
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(arguments, interpret=params, tiles=(2, 1))


def test_long_sequences_take_large_steps():
    def tokens(table, window=None):
        return make_plan(*operands(table=table, page=128, lengths=[9]), window=window).tokens

    assert [tokens(table) for table in (1, 8, 16, 32, 64)] == [128, 256, 512, 1024, 2048]
    assert tokens(64, window=1024) == 256  # as few as fit the window well


@pytest.mark.parametrize(
    ("n", "k", "tiles"),
    [(1, 1, None), (6, 6, (1, 3)), (8, 1, (3, 1)), (12, 4, None), (12, 4, (1, 1))],
)
def test_groups_of_heads_and_blocks(n, k, tiles):
    check(operands(n=n, k=k), tiles=tiles, window=40)


@pytest.mark.parametrize(("h", "page", "table"), [(128, 128, 1), (80, 48, 2), (256, 16, 3)])
def test_head_and_page_sizes(h, page, table):
    check(operands("int8", h=h, page=page, table=table, lengths=[page * table, 5]))


@pytest.mark.parametrize("options", [{}, {"window": 33}, {"window": 6}], ids=str)
def test_float8_pages_of_whole_tiles_are_not_widened(options):
    """Lengths and windows that end at each of the four tokens in a word, NaN beyond."""
    lengths = [0, 37, 38, 39, 40, 96]
    check(operands("float8_e4m3fn", page=32, table=3, lengths=lengths), tiles=(2, 1), **options)


@pytest.mark.parametrize("window", [1, 16, 17, 33, 80, 1000])
def test_a_window_at_every_edge_of_a_block(window):
    arguments = operands(lengths=range(64, 81, 4))
    check(arguments, tiles=(2, 2), window=window)


def test_a_window_bounds_the_grid():
    arguments = operands(table=400, lengths=[16])
    assert make_plan(*arguments, tiles=(2, 1)).grid == (1, 1, 2, 200)
    # 33 tokens that start at the last token of a block end in the second block after it.
    assert make_plan(*arguments, tiles=(2, 1), window=34).grid == (1, 1, 2, 3)
    assert make_plan(*arguments, tiles=(2, 1), window=33).grid == (1, 1, 2, 2)


def test_race_free_and_reads_nothing_uninitialised():
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(operands("int8", lengths=[0, 37, 80]), interpret=params, tiles=(2, 1), window=50)


def test_lengths_beyond_the_table_are_cut():
    arguments = operands(lengths=[80, 80])
    q, k, v, table, _ = arguments
    got = kv_attention(q, k, v, table, jnp.asarray([80, 999], jnp.int32))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(kv_attention(*arguments)))


def test_jit_and_scales_on_fp8():
    q, k, v, *rest = operands("float8_e4m3fn")
    scales = [jnp.full((2, k.shape[1], 1, 16), s, jnp.float32) for s in (0.5, 3.0)]
    got = jax.jit(kv_attention)(q, k, v, *rest, *scales)
    want = reference_kv_attention(q, k, v, *rest, *scales)
    assert np.linalg.norm(got - want) <= TOLERANCE["bfloat16"] * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 3, 32)}, "3 query heads are not a multiple of 2 key heads"),
        ({"q": (2, 4, 16)}, r"k_pages is \(2, 7, 16, 32\), which does not fit q \(2, 4, 16\)"),
        ({"q": (2, 4)}, "need 3, 4 and 2 axes"),
        ({"v": (2, 7, 32, 32)}, "v_pages is"),
        ({"lengths": (3,)}, r"lengths is \(3,\)"),
        ({"kv": (2, 7, 8, 32)}, "pages of 8 tokens; supported: multiples of 16"),
        ({"dtype": jnp.float8_e5m2}, "k_pages is float8_e5m2; supported: bfloat16, float8_e4m3fn"),
        ({"dtype": jnp.int8}, "int8 pages need k_scales and v_scales"),
        ({"scales": [(2, 7, 1, 16), None]}, "give both k_scales and v_scales"),
        ({"scales": [(2, 7, 16), (2, 7, 16)]}, r"k_scales is float32\(2, 7, 16\); supported"),
        ({"window": 0}, "window is 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"tiles": (1, 3)}, "3 does not divide 2 key heads"),
    ],
)
def test_refusals_give_the_reason(change, message):
    def array(shape, dtype=jnp.bfloat16) -> Any:
        return None if shape is None else jnp.zeros(shape, dtype)

    dtype = change.get("dtype", jnp.bfloat16)
    kv = change.get("kv", (2, 7, 16, 32))
    # Unwrapped: the tests' checks of annotations would refuse some of these first.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(kv_attention)(
            array(change.get("q", (2, 4, 32))),
            array(kv, dtype),
            array(change.get("v", kv), dtype),
            jnp.zeros((2, 5), jnp.int32),
            jnp.zeros(change.get("lengths", (2,)), jnp.int32),
            *(array(s, jnp.float32) for s in change.get("scales", [None, None])),
            **{name: change[name] for name in ("window", "softcap", "tiles") if name in change},
        )
