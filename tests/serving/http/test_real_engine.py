"""The server on the real engine: what clients read is what the model says, and nothing leaks."""

import concurrent.futures
import dataclasses

import jax
import pytest
from running_server import serving, wait_until
from serving_model import MODEL
from serving_model import serving as placed

from tpu_stack.errors import UserError
from tpu_stack.models.decoder import init_params
from tpu_stack.serving.engine.build import Side, start_service
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.requests import Finished, GenerationRequest, QueueFull, Token
from tpu_stack.serving.service import Service

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def config(tokenizer):
    return dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, max_seq_len=128)


@pytest.fixture(scope="module")
def engine(config):
    profile, mesh = placed("tensor=1", float32=True)
    params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
    service = start_service(
        config, params, profile, mesh, EngineOptions(queue=64, page=16, pages=24)
    )
    yield service
    service.close()


@pytest.fixture(scope="module")
def server(tokenizer, chatml, engine):
    with serving(tokenizer, chat=chatml, engine=engine) as running:
        yield running


def answer(service: Service, request: GenerationRequest) -> list[int]:
    """Tokens of a request made past the server."""
    events: list = []
    service.submit(request, events.append)
    wait_until(lambda: events and isinstance(events[-1], Finished))
    return [event.token for event in events if isinstance(event, Token)]


def idle(service: Service) -> bool:
    stats = service.stats()
    pages = stats.pages_free + stats.pages_cached
    return not stats.running and not stats.waiting and pages == stats.pages


def test_clients_read_what_the_model_says(server, engine, tokenizer):
    prompt = tuple(tokenizer.encode(PROMPT))
    want = tokenizer.decode(answer(engine, GenerationRequest(prompt, 12)))
    client = server.client()
    how = {"model": "fake", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**how, n=2, logprobs=2)
    assert [choice.text for choice in whole.choices] == [want, want]
    assert whole.usage.completion_tokens == 24
    streamed = client.completions.create(**how, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == want


def test_dropped_and_whole_streams_leave_nothing_behind(server, engine):
    """Sixty streams on 24 pages, so that some are preempted; every third is dropped midway."""
    client = server.client()

    def one(number: int) -> int:
        with client.completions.create(
            model="fake", prompt=PROMPT * (1 + number % 3), max_tokens=30, seed=number, stream=True
        ) as stream:
            for pieces, event in enumerate(stream):
                if number % 3 == 0 and pieces == 4:
                    return 0
                if event.choices[0].finish_reason is not None:
                    return 1
        raise AssertionError(f"stream {number} ended without a reason")

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        whole = sum(pool.map(one, range(60)))
    assert whole >= 40
    wait_until(lambda: idle(engine))
    assert engine.stats().recompilations == 0


def test_a_full_queue_refuses_and_a_cancelled_request_ends(config, engine):
    tickets, ended = [], []
    request = GenerationRequest((1, 2, 3), 100)

    def ask() -> None:
        listener = lambda e: ended.append(e) if isinstance(e, Finished) else None  # noqa: E731
        tickets.append(engine.submit(request, listener))

    def ask_too_often() -> None:
        for _ in range(200):
            ask()

    with pytest.raises(QueueFull, match="retry in"):
        ask_too_often()
    for ticket in tickets:
        engine.cancel(ticket)
    wait_until(lambda: len(ended) == len(tickets))
    wait_until(lambda: idle(engine))
    assert "cancelled" in {event.reason for event in ended}


def test_closing_finishes_what_it_has_and_takes_no_more(config):
    profile, mesh = placed("tensor=2", float32=True)
    params = init_params(config, jax.random.key(0))
    service = start_service(config, params, profile, mesh, EngineOptions())
    events: list = []
    service.submit(GenerationRequest((5, 6), 9), events.append)
    service.close(drain_s=30)
    assert events[-1] == Finished("length", 2, 9)
    with pytest.raises(UserError, match="shutting down"):
        service.submit(GenerationRequest((5, 6), 9), events.append)


@pytest.mark.slow
def test_heads_split_over_devices_give_the_same_tokens(config):
    params = jax.tree.map(lambda x: 3 * x, init_params(config, jax.random.key(0)))
    said = []
    for mesh_text in ("tensor=1", "tensor=4"):
        profile, mesh = placed(mesh_text, float32=True)
        service = start_service(config, params, profile, mesh, EngineOptions(guesses=2))
        said.append(answer(service, GenerationRequest(tuple(range(40, 60)), 40)))
        service.close()
    assert said[0] == said[1]


def test_what_cannot_be_built_is_refused_by_name(config):
    profile, mesh = placed("data=2,tensor=2", float32=True)
    params = init_params(config, jax.random.key(0))
    one, single = placed("tensor=1", float32=True)
    with pytest.raises(UserError, match="data=2"):
        start_service(
            config, params, one, single, EngineOptions(), prefill=Side(params, profile, mesh)
        )
    profile, mesh = one, single
    with pytest.raises(UserError, match="pages is 3"):
        start_service(config, params, profile, mesh, EngineOptions(page=16, pages=3))
    with pytest.raises(UserError, match="page is 24"):
        EngineOptions(page=24)
