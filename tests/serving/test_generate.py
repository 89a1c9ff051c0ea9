"""Text from an engine: pieces add up, rows end where they should, and meshes change nothing."""

from functools import partial

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
from tpu_stack.serving.engine.build import start_service
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.generate import GenerationStats, stream_text
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.pack import pack
from tpu_stack.serving.requests import Finished, QueueFull, SamplingParams, Token
from tpu_stack.serving.service import Service, Stats, Ticket

LENGTH, NEW = 48, 12
PROMPTS = [[5, 9, 33, 2, 41], [7], [(3 * i + 1) % 50 for i in range(16)]]


def service_on(trained, mesh: str, params=None) -> Service:
    """An engine in float32, where equal tokens can be asked for; it compiles what it runs."""
    profile, devices = serving(mesh, float32=True)
    if params is None:
        layout = PackedLayout.of(trained.config, "float32", profile, devices)
        params = jax.device_put(trained.params, layout.shardings)
    options = EngineOptions(slots=4, max_length=LENGTH)
    return start_service(trained.config, params, profile, devices, options, warm_up=False)


def generated(trained, service: Service, count: int = NEW) -> list[str]:
    """The text after each of PROMPTS."""
    texts = [""] * len(PROMPTS)
    prompts = [trained.tokenizer.decode(prompt) for prompt in PROMPTS]
    for row, piece in stream_text(service, trained.tokenizer, prompts, max_tokens=count):
        texts[row] += piece
    service.close()
    return texts


def without_cache(trained, params, count: int = NEW) -> list[str]:
    """Greedy text by a whole pass per token; a row does not see what lies beyond its end."""
    run, eod = jax.jit(partial(forward, MODEL)), trained.tokenizer.eod_id
    texts = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            padded = np.zeros((1, LENGTH), np.int32)
            padded[0, : len(tokens)] = tokens
            logits = np.asarray(run(params, jnp.asarray(padded)))[0, len(tokens) - 1]
            best = np.sort(logits)
            assert best[-1] - best[-2] > 1e-3  # no tie that rounding could turn
            if logits.argmax() == eod:
                break
            tokens.append(int(logits.argmax()))
        texts.append(trained.tokenizer.decode(tokens[len(prompt) :]))
    return texts


@pytest.mark.parametrize("mesh", ["data=1", "tensor=4", "data=2,tensor=4"])
def test_greedy_text_is_that_of_a_loop_without_a_cache_on_any_mesh(trained, mesh):
    assert generated(trained, service_on(trained, mesh)) == without_cache(trained, trained.params)


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
    wanted = without_cache(trained, floats, count=6)
    for mesh in ("data=1", "data=2,tensor=2"):
        service = service_on(trained, mesh, bundle.load(*serving(mesh), split=True))
        assert generated(trained, service, 6) == wanted


def test_a_batch_compiles_what_it_runs(trained):
    """Prefill, the first tokens' program, decode: no other width, nothing for preemption."""
    service = service_on(trained, "data=1")
    generated(trained, service)
    assert service.stats().programs == 3


class Scripted:
    """A service that says what it is told, row by row."""

    max_length, vocab_size = 100, 64

    def __init__(self, rows: list[list[int]], reason: str = "length"):
        self.rows, self.reason = rows, reason
        self.asked, self.cancelled = [], []

    def submit(self, request, listener):
        tokens = self.rows[len(self.asked)]
        self.asked.append(request)
        reason, said = self.reason, 0
        for token in tokens[: request.max_tokens]:
            if token in request.stop_tokens:
                reason = "stop"
                break
            listener(Token(token))
            said += 1
        listener(Finished(reason, len(request.prompt), said, detail="the device is gone"))  # type: ignore[arg-type]
        return Ticket(len(self.asked), request)

    def cancel(self, ticket):
        self.cancelled.append(ticket.number)

    def load(self, params, in_flight="finish"):
        raise NotImplementedError

    def stats(self):
        return Stats()

    def describe(self):
        return {}

    def close(self, drain_s=None):
        pass


def collect(trained, service: Service, prompts=("!", '""'), **options):
    stats, rows = GenerationStats(), [""] * len(prompts)
    for row, piece in stream_text(service, trained.tokenizer, prompts, stats=stats, **options):
        assert piece
        rows[row] += piece
    return rows, stats


def test_rows_end_at_the_end_of_a_document_or_at_their_limit(trained):
    eod = trained.tokenizer.eod_id
    a, b = trained.tokenizer.encode("AB")
    rows, stats = collect(trained, Scripted([[a, eod, a], [b] * 9]), max_tokens=4)
    assert rows == ["A", "BBBB"]
    assert stats.finished == ["stop", "length"]
    assert (stats.new_tokens, stats.prompt_tokens) == (5, 3)
    assert stats.tokens_per_s is not None


def test_prompts_begin_and_rows_end_as_the_chat_format_says(trained):
    a, b = trained.tokenizer.encode("AB")
    chat = ChatFormat(bos_token=EOD, add_bos=True, stop_tokens=(a,))
    service, eod = Scripted([[b, a, b], [b, b, b]]), trained.tokenizer.eod_id
    rows, stats = collect(trained, service, ("A", ""), max_tokens=3, chat=chat)
    # An empty prompt, begun, is one.
    assert [request.prompt for request in service.asked] == [(eod, a), (eod,)]
    assert (rows, stats.finished) == (["B", "BBB"], ["stop", "length"])


def test_rows_have_seeds_of_their_own(trained):
    service = Scripted([[1], [1]])
    collect(trained, service, sampling=SamplingParams(temperature=1.0, seed=2**32 - 1))
    assert [request.sampling.seed for request in service.asked] == [2**32 - 1, 0]
    assert {request.sampling.temperature for request in service.asked} == {1.0}


def test_rows_are_cancelled_when_the_iterator_is_closed(trained):
    service = Scripted([[1] * 9, [1] * 9])
    stream = stream_text(service, trained.tokenizer, ["!", "!"])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert service.cancelled == [1, 2]


class Bounded(Scripted):
    """Holds one request; it is full, and ends that one, when it is asked to take another."""

    def __init__(self, rows: list[list[int]]):
        super().__init__(rows)
        self.held = None

    def submit(self, request, listener):
        held, self.held = self.held, None
        if held is not None:
            held()
            raise QueueFull(1, 0.0)
        ticket = Ticket(len(self.asked) + 1, request)
        submit = super().submit
        if ticket.number == len(self.rows):  # the last: nobody comes after it
            return submit(request, listener)
        self.held = lambda: submit(request, listener)
        return ticket


def test_more_prompts_than_the_queue_takes(trained):
    a, b, c = trained.tokenizer.encode("ABC")
    rows, stats = collect(trained, Bounded([[a], [b, b], [c], [a]]), ["!"] * 4)
    assert rows == ["A", "BB", "C", "A"]
    assert stats.finished == ["length"] * 4


def test_an_engine_that_closes_is_no_silence(trained):
    with pytest.raises(RuntimeError, match="closed"):
        collect(trained, Scripted([[1], [1]], reason="cancelled"))


def test_an_engine_that_fails_is_no_silence(trained):
    with pytest.raises(RuntimeError, match="the device is gone"):
        collect(trained, Scripted([[1], [1]], reason="error"))


def test_an_empty_prompt_is_named(trained):
    with pytest.raises(UserError, match="prompt number 2 is empty"):
        collect(trained, Scripted([[1], [1]]), ("A", ""))
