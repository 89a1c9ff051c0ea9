"""The engine's tokens are those of a plain loop over `forward`, in any batch and on any mesh."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_model import MODEL, serving

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import EOD
from tpu_stack.errors import UserError
from tpu_stack.models.decoder import forward
from tpu_stack.serving.bundle import Bundle
from tpu_stack.serving.engine import Engine
from tpu_stack.serving.generate import GenerationStats, Request, stream_text
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.pack import pack
from tpu_stack.serving.sampler import Sampling

BATCH, LENGTH, NEW = 4, 48, 12
PROMPTS = [[5, 9, 33, 2, 61], [7], [(3 * i + 1) % 64 for i in range(16)]]


def engine_on(trained, mesh: str, params=None, **sizes) -> Engine:
    """An engine in float32, where equal tokens can be asked for."""
    profile, devices = serving(mesh, float32=True)
    if params is None:
        layout = PackedLayout.of(trained.config, "float32", profile, devices)
        params = jax.device_put(trained.params, layout.shardings)
    sizes = {"batch": BATCH, "length": LENGTH, **sizes}
    return Engine(trained.config, params, profile, devices, **sizes)


def generated(engine: Engine, prompts, count: int = NEW, **options) -> np.ndarray:
    """[B, count] tokens, the first from the prefill."""
    state = engine.prefill(prompts, Sampling.of(engine.batch, **options))
    found = [np.asarray(state.tokens)]
    for _ in range(count - 1):
        state = engine.decode(state)
        found.append(np.asarray(state.tokens))
    return np.stack(found, axis=1)


def without_cache(params, prompts, count: int = NEW, length: int = LENGTH) -> np.ndarray:
    """Greedy tokens by a whole pass per token; a row does not see what lies beyond its end."""
    run = jax.jit(partial(forward, MODEL))
    tokens = np.zeros((len(prompts), length), np.int32)
    ends = np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    found = []
    for _ in range(count):
        logits = np.asarray(run(params, jnp.asarray(tokens)))[np.arange(len(prompts)), ends - 1]
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-3  # no tie that rounding could turn
        tokens[np.arange(len(prompts)), ends] = logits.argmax(axis=-1)
        found.append(logits.argmax(axis=-1))
        ends += 1
    return np.stack(found, axis=1)


@pytest.fixture(scope="module")
def wanted(trained) -> np.ndarray:
    return without_cache(trained.params, PROMPTS)


@pytest.fixture(scope="module")
def engine(trained) -> Engine:
    return engine_on(trained, "data=1")


def test_greedy_equals_a_loop_without_a_cache(engine, wanted):
    found = generated(engine, PROMPTS)
    np.testing.assert_array_equal(found[:3], wanted)
    np.testing.assert_array_equal(found[3], wanted[0])  # a row not asked for repeats the first
    assert len(np.unique(found)) > 10  # the model does not repeat one token


def test_a_prompt_alone_or_in_company(engine, wanted):
    """Rows do not see each other, and the padding of the batch changes nothing."""
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(generated(engine, [prompt])[0], wanted[row])
    turned = generated(engine, PROMPTS[::-1])
    np.testing.assert_array_equal(turned[:3], wanted[::-1])


@pytest.mark.parametrize("mesh", ["data=4", "tensor=4", "data=2,tensor=4"])
def test_the_mesh_changes_nothing(trained, wanted, mesh):
    engine = engine_on(trained, mesh)
    np.testing.assert_array_equal(generated(engine, PROMPTS)[:3], wanted)
    state = engine.prefill(PROMPTS, Sampling.of(BATCH))
    keys = engine.decode(state).cache.k
    data, tensor = (engine.mesh.shape[axis] for axis in ("data", "tensor"))
    assert keys.sharding.shard_shape(keys.shape)[1] == BATCH // data
    assert keys.sharding.shard_shape(keys.shape)[3] == MODEL.n_kv_heads // tensor


@pytest.mark.slow
def test_packed_weights_on_two_meshes(trained, tmp_path):
    """int4 from a bundle: what its dequantized weights generate without a cache, on either mesh."""
    pack(trained.run, "int4", *serving("data=1"), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    floats = jax.tree.map(
        lambda w: w.dequantize() if hasattr(w, "dequantize") else w.astype(jnp.float32),
        bundle.load(*serving("data=1")),
        is_leaf=lambda w: hasattr(w, "dequantize"),
    )
    wanted = without_cache(floats, PROMPTS, count=6)
    for mesh in ("data=1", "data=2,tensor=2"):
        engine = engine_on(trained, mesh, bundle.load(*serving(mesh)))
        np.testing.assert_array_equal(generated(engine, PROMPTS, 6)[:3], wanted)


def test_programs_grow_with_buckets_only(trained):
    """One decode program, and one prefill program per bucket of prompt lengths: 16, 32, 40."""
    engine = engine_on(trained, "data=1", length=40)
    generated(engine, PROMPTS, 3)
    assert engine.programs == 2
    generated(engine, [[1, 2, 3]], 3, temperature=0.7, top_k=5, top_p=0.9, seed=4)
    generated(engine, [[8] * 16] * 4, 5)
    assert engine.programs == 2
    generated(engine, [[8] * 17], 3)
    assert engine.programs == 3
    generated(engine, [[8] * 39], 1)  # the last bucket is the cache's length
    assert engine.programs == 4
    generated(engine, [[8] * 33, [1]], 1)
    assert engine.programs == 4


def test_sampling_is_by_row_and_reproducible(engine):
    options = {"temperature": 1.0, "seed": 11}
    first = generated(engine, PROMPTS, **options)
    np.testing.assert_array_equal(generated(engine, PROMPTS, **options), first)
    assert (generated(engine, PROMPTS, temperature=1.0, seed=50) != first).mean() > 0.5
    # Row 1 is seeded with 12; alone in row 0 under seed 12 it draws the same tokens.
    alone = generated(engine, [PROMPTS[1]], temperature=1.0, seed=12)
    np.testing.assert_array_equal(alone[0], first[1])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([], "0 prompts; this engine takes 1 to 4"),
        ([[1]] * 5, "5 prompts; this engine takes 1 to 4"),
        ([[1], []], "a prompt is empty"),
        ([[1] * 48], "a prompt has 48 tokens; at most 47"),
        ([[1] * 500], "a prompt has 500 tokens"),
    ],
)
def test_prompts_that_are_refused(engine, prompts, said):
    with pytest.raises(UserError, match=said):
        engine.prefill(prompts, Sampling.of(BATCH))


def test_a_batch_that_does_not_divide(trained):
    with pytest.raises(UserError, match="batch size 3 does not divide over data=2"):
        engine_on(trained, "data=2", batch=3)


def test_streamed_text_is_the_decoded_tokens(trained, engine, wanted):
    """Pieces of several rows, interleaved, add up to each row's text; greedy, so known before."""
    prompts = [trained.tokenizer.decode(prompt) for prompt in ([5, 9, 33, 2], [7])]
    stats = GenerationStats()
    rows = ["", ""]
    request = Request(max_tokens=NEW)
    for row, piece in stream_text(engine, trained.tokenizer, prompts, request, stats):
        assert piece
        rows[row] += piece
    tokens = generated(engine, [trained.tokenizer.encode(prompt) for prompt in prompts])[:2]
    for row, text in enumerate(rows):
        upto = tokens[row].tolist()
        if trained.tokenizer.eod_id in upto:
            upto = upto[: upto.index(trained.tokenizer.eod_id)]
        assert text == trained.tokenizer.decode(upto)
    assert stats.prompt_tokens == 5
    assert set(stats.finished) <= {"length", "stop"}


class Scripted:
    """An engine that says what it is told, column by column."""

    batch = 2

    def __init__(self, columns: list[list[int]], length: int = 100):
        self.columns, self.length = columns, length

    def prefill(self, prompts, sampling):
        return SimpleNamespace(tokens=np.array(self.columns[0]), at=0)

    def decode(self, state):
        at = state.at + 1
        return SimpleNamespace(tokens=np.array(self.columns[at]), at=at)


def collect(trained, columns, request, **options) -> tuple[list[str], GenerationStats]:
    stats, rows = GenerationStats(), ["", ""]
    engine = Scripted(columns, **options)
    for row, piece in stream_text(engine, trained.tokenizer, ["!", '""'], request, stats):  # type: ignore[arg-type]
        rows[row] += piece
    return rows, stats


def test_rows_end_at_the_end_of_a_document_or_at_their_limit(trained):
    eod = trained.tokenizer.eod_id
    a, b = trained.tokenizer.encode("AB")
    rows, stats = collect(trained, [[a, b], [eod, b], [a, b], [a, b]], Request(max_tokens=4))
    assert rows == ["A", "BBBB"]
    assert stats.finished == ["stop", "length"]
    assert (stats.new_tokens, stats.decode_steps, stats.prompt_tokens) == (6, 3, 3)
    rows, stats = collect(trained, [[a, b]], Request(max_tokens=1))
    assert (rows, stats.decode_steps) == (["A", "B"], 0)


def test_prompts_begin_and_rows_end_as_the_chat_format_says(trained):
    a, b = trained.tokenizer.encode("AB")
    seen = []

    class Watched(Scripted):
        def prefill(self, prompts, sampling):
            seen.extend(prompts)
            return super().prefill(prompts, sampling)

    chat = ChatFormat(bos_token=EOD, add_bos=True, stop_tokens=(a,))
    request, stats, rows = Request(max_tokens=3), GenerationStats(), ["", ""]
    engine: Any = Watched([[b, b], [a, b], [b, b]])
    tokenizer = trained.tokenizer
    for row, piece in stream_text(engine, tokenizer, ["A", ""], request, stats, chat):
        rows[row] += piece
    assert seen == [[tokenizer.eod_id, a], [tokenizer.eod_id]]  # an empty prompt, begun, is one
    assert (rows, stats.finished) == (["B", "BBB"], ["stop", "length"])


def test_rows_end_when_the_cache_is_full(trained):
    a, b = trained.tokenizer.encode("AB")
    rows, stats = collect(trained, [[a, b]] * 9, Request(max_tokens=50), length=6)
    assert rows == ["AAAAA", "BBBB"]  # 1 + 5 and 2 + 4 positions
    assert stats.finished == ["length", "length"]
