"""How requests end other than by an answer: clients leave, deadlines pass, servers drain."""

import json
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from running_server import serving, wait_until

from tpu_stack.errors import UserError
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.http.server import bind

GOOD: dict[str, Any] = {"model": "fake", "prompt": "the fox ", "max_tokens": 6, "temperature": 0}


def raw_request(url: str, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a completion was asked for, and nothing was read."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_all(connection: socket.socket) -> str:
    connection.settimeout(20)
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
        if b"[DONE]" in part or b"0\r\n\r\n" in part:
            break
    return b"".join(parts).decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_dropped_connection_frees_its_requests(tokenizer, stream):
    with serving(tokenizer, slots=2) as running:
        running.service.gate.clear()
        dropped = [raw_request(running.url, GOOD | {"stream": stream, "n": 2}) for _ in range(3)]
        wait_until(lambda: running.service.busy == 6)
        answered = []
        other = threading.Thread(
            target=lambda: answered.append(
                running.client().completions.create(**GOOD).choices[0].text
            )
        )
        other.start()
        wait_until(lambda: running.service.busy == 7)
        for connection in dropped:
            connection.close()
        wait_until(lambda: running.service.busy == 1)
        running.service.gate.set()
        other.join(timeout=10)
        assert answered == ["the fox the fox "[: len(answered[0])]]
        wait_until(lambda: not running.host.calls)
        assert (
            b'tpu_stack_sequences_total{reason="cancelled"} 6.0'
            in running.host.metrics.exposition()
        )


def test_a_connection_dropped_before_its_body_harms_nobody(tokenizer):
    with serving(tokenizer) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            )
        assert running.client().completions.create(**GOOD).choices[0].finish_reason == "length"
        assert not running.service.busy


def test_a_body_that_never_ends_is_given_up(tokenizer):
    with serving(tokenizer, limits=Limits(stall_s=0.2)) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
                b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
            )
            connection.settimeout(10)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_reader_too_slow_is_cancelled_and_told(tokenizer):
    """Its socket is full, and so is its queue; another client's answer comes as ever."""
    limits = Limits(pending_tokens=64)
    script = tuple(tokenizer.encode("x" * 50000))
    options = {"logprobs": 5, "stream": True, "max_tokens": 40000}
    with serving(
        tokenizer, limits=limits, script=script, max_length=100000, vocab_size=512
    ) as running:
        slow = raw_request(running.url, GOOD | options, receive_buffer=4096)
        wait_until(lambda: running.service.stats().finished.get("cancelled"))
        wait_until(lambda: running.service.busy == 0)
        found = running.client().completions.create(**GOOD)
        assert found.choices[0].finish_reason == "length"
        text = read_all(slow)
        slow.close()
        assert '"code":"slow_reader"' in text
        assert "the reader is too slow" in text
        assert text.count('"finish_reason":null') < 40000
        wait_until(lambda: not running.host.calls)


def test_a_reader_that_takes_nothing_is_given_up(tokenizer):
    limits = Limits(pending_tokens=64, stall_s=0.3)
    script = tuple(tokenizer.encode("x" * 50000))
    options = {"logprobs": 5, "stream": True, "max_tokens": 40000}
    with serving(
        tokenizer, limits=limits, script=script, max_length=100000, vocab_size=512
    ) as running:
        stuck = raw_request(running.url, GOOD | options, receive_buffer=4096)
        wait_until(lambda: running.service.stats().finished.get("cancelled"))
        wait_until(lambda: not running.host.calls)
        assert running.client().models.list().data
        stuck.close()


def test_a_deadline_that_passes(tokenizer):
    with serving(tokenizer) as running:
        running.service.gate.clear()
        with pytest.raises(openai.APIStatusError) as passed:
            running.client().completions.create(**GOOD, extra_body={"deadline_s": 0.05})
        assert (passed.value.status_code, passed.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.APIError, match="deadline"):
            list(
                running.client().completions.create(
                    **GOOD, stream=True, extra_body={"deadline_s": 0.05}
                )
            )
        assert not running.service.busy


def test_an_engine_that_fails_is_a_500(tokenizer):
    with serving(tokenizer, fail_with="no pages") as running:
        with pytest.raises(openai.InternalServerError, match="no pages") as failed:
            running.client().completions.create(**GOOD)
        assert failed.value.code == "engine_error"
        with pytest.raises(openai.APIError, match="no pages"):
            list(running.client().completions.create(**GOOD, stream=True))


def test_new_weights_void_what_was_said(tokenizer):
    """A whole answer starts over; a stream whose text was read ends in an error."""
    with serving(tokenizer, restart_after=3) as running:
        text = running.client().completions.create(**GOOD).choices[0].text
        ids = tokenizer.encode("the fox ")
        assert text == tokenizer.decode([ids[at % len(ids)] for at in range(6)])
        running.service.restart_after = 3
        running.service.step_s = 0.02
        with pytest.raises(openai.APIError, match="weights were replaced"):
            list(running.client().completions.create(**GOOD, stream=True))
        wait_until(lambda: running.service.busy == 0)


def test_a_drain_finishes_what_is_in_flight_and_takes_no_more(tokenizer):
    with serving(tokenizer) as running:
        running.service.gate.clear()
        client = running.client()
        stream = client.completions.create(**GOOD, stream=True)
        wait_until(lambda: running.service.busy == 1)
        running.server.drain()
        refused = httpx.post(f"{running.url}/v1/completions", json=GOOD)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "service_unavailable"
        assert httpx.get(f"{running.url}/readyz").status_code == 503
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        running.service.gate.set()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        running.thread.join(timeout=10)
        assert not running.thread.is_alive()


def test_a_drain_that_takes_too_long_ends_in_an_error(tokenizer):
    with serving(tokenizer, drain_s=0.2) as running:
        running.service.gate.clear()
        stream = running.client().completions.create(**GOOD, stream=True)
        wait_until(lambda: running.service.busy == 1)
        running.server.drain()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        running.thread.join(timeout=10)
        assert running.service.busy == 0


def test_two_servers_on_one_port(tokenizer):
    with serving(tokenizer) as running:
        port = int(running.url.rpartition(":")[2])
        with pytest.raises(UserError, match=f"port {port} is in use"):
            bind("127.0.0.1", port)
        assert running.client().models.list().data


def test_many_streams_at_once(tokenizer):
    """Forty clients, a third of which leave midway: the rest read all of their own text."""
    texts: dict[int, str] = {}
    with serving(tokenizer, slots=8, queue=64, step_s=0.001) as running:

        def read(number: int) -> None:
            body = GOOD | {"prompt": f"{number} fox {number} ", "max_tokens": 30, "stream": True}
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line[6:])["choices"][0]
                        texts[number] = texts.get(number, "") + choice["text"]
                        if number % 3 == 0:
                            return

        threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        wait_until(lambda: running.service.busy == 0 and not running.host.calls)
        for number in range(40):
            ids = tokenizer.encode(f"{number} fox {number} ")
            whole = tokenizer.decode([ids[at % len(ids)] for at in range(30)])
            assert texts[number] == whole or (number % 3 == 0 and whole.startswith(texts[number]))
