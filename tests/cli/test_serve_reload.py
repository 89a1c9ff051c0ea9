"""New weights under a running server: the signal, what is read, and what is refused."""

import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tpu_stack.cli.serve.reload import catch_reloads, reload_when
from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import build_tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_of, tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import init_params
from tpu_stack.serving.bundle import write_bundle
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.launch import Served, Weights, Where, start_engine
from tpu_stack.serving.requests import Finished, GenerationRequest, Token

MODEL = ModelConfig(
    vocab_size=64, d_model=64, n_layers=1, n_heads=8, n_kv_heads=8, head_dim=8, d_ff=64,
    max_seq_len=64,
)  # fmt: skip
REQUEST = GenerationRequest((5, 9, 33, 2), max_tokens=20)


def bundle(out: Path, seed: int, chat: ChatFormat | None = None) -> Path:
    text = "".join(map(chr, range(ord(" "), ord(" ") + 50)))
    tokenizer = build_tokenizer("chars", [Document(text, "text")])
    params = jax.tree.map(lambda x: 3 * x, init_params(MODEL, jax.random.key(seed)))
    tensors = [
        (spec.name, np.asarray(tensor_of(params, spec.name)).astype("bfloat16"))
        for spec in tensor_specs(MODEL)
    ]
    write_bundle(out, MODEL, "bf16", tokenizer, {}, tensors, chat=chat)
    return out


@pytest.fixture(scope="module")
def link(tmp_path_factory) -> Path:
    """A link to the first of three bundles, of which the last has another chat format."""
    folder = tmp_path_factory.mktemp("reload")
    bundle(folder / "one", 0)
    bundle(folder / "two", 1)
    bundle(folder / "chatty", 1, ChatFormat(stop_tokens=(3,)))
    (folder / "now").symlink_to("one")
    return folder / "now"


def turn(link: Path, to: str) -> None:
    (link.parent / "next").symlink_to(to)
    (link.parent / "next").rename(link)


def wait(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def answer(served: Served) -> list[int]:
    events: list = []
    served.service.submit(REQUEST, events.append)
    wait(lambda: events and isinstance(events[-1], Finished))
    return [event.token for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("where", [{}, {"prefill": "8t:1", "decode": "8i:1"}])
def test_a_link_that_turned_is_read_and_what_does_not_fit_is_not(link, where, monkeypatch):
    monkeypatch.setattr("tpu_stack.serving.engine.build.CHUNKS", (64,))
    monkeypatch.setattr("tpu_stack.serving.engine.build.PROMPTS", (1,))
    served = start_engine(Weights.of(link), Where(**where), EngineOptions())
    try:
        first = answer(served)
        turn(link, "two")
        assert served.reload("finish") == link.parent / "two"
        wait(lambda: served.service.stats().generation == 1)
        assert answer(served) != first
        turn(link, "one")
        served.reload("restart")
        wait(lambda: served.service.stats().generation == 2)
        assert answer(served) == first

        turn(link, "nowhere")
        with pytest.raises(UserError, match="nowhere"):
            served.reload("finish")
        turn(link, "chatty")
        with pytest.raises(UserError, match="now now has another chat than the running model"):
            served.reload("finish")
        assert answer(served) == first
        stats = served.service.stats()
        assert (stats.generation, stats.recompilations) == (2, 0)
    finally:
        served.service.close()
        turn(link, "one")


def test_a_draft_is_read_again_with_its_model(link, monkeypatch):
    """A draft that is the model itself guesses right; beside another model it guesses wrong, and
    the tokens are the model's all the same."""
    monkeypatch.setattr("tpu_stack.serving.engine.build.CHUNKS", (64,))
    monkeypatch.setattr("tpu_stack.serving.engine.build.PROMPTS", (1,))
    draft = link.parent / "draft"
    draft.symlink_to("one")
    served = start_engine(Weights.of(link), Where(draft=draft), EngineOptions())

    def share() -> tuple[list[int], float]:
        before = served.service.stats()
        tokens = answer(served)
        after = served.service.stats()
        return tokens, (after.accepted - before.accepted) / (after.drafted - before.drafted)

    try:
        first, right = share()
        assert right > 0.8  # all but those beyond the last token
        turn(link, "two")
        served.reload("finish")
        wait(lambda: served.service.stats().generation == 1)
        second, wrong = share()
        assert second != first
        assert wrong < 0.5
        draft.unlink()
        draft.symlink_to("two")
        served.reload("finish")
        wait(lambda: served.service.stats().generation == 2)
        assert share() == (second, right)
        assert served.service.stats().recompilations == 0
    finally:
        served.service.close()
        turn(link, "one")


def test_a_signal_reloads_and_an_error_is_one_line(capsys):
    asked = threading.Semaphore(0)
    replies = iter([Path("runs/b"), UserError("runs/b is damaged"), MemoryError("no\nroom")])

    def reply() -> Path:
        asked.release()
        said = next(replies)
        if isinstance(said, Exception):
            raise said
        return said

    before = signal.getsignal(signal.SIGUSR1)
    try:
        wanted = catch_reloads()
        os.kill(os.getpid(), signal.SIGUSR1)  # before anything is served: not lost
        reload_when(wanted, reply)
        lines = []
        for number in range(3):
            if number:
                os.kill(os.getpid(), signal.SIGUSR1)
            assert asked.acquire(timeout=10)
            wait(lambda: lines.append(capsys.readouterr().err) or lines[-1])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [line for line in lines if line] == [
        "reloaded runs/b: new requests get its weights\n",
        "not reloaded: runs/b is damaged\n",
        "not reloaded: MemoryError: no room\n",
    ]
