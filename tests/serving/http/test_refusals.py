"""What a client may get wrong, and the answer that names it; others never notice."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest
from running_server import serving, wait_until

from tpu_stack.serving.http.host_names import LOOPBACK
from tpu_stack.serving.http.limits import Limits

GOOD: dict[str, Any] = {"model": "fake", "prompt": "the fox", "max_tokens": 4, "temperature": 0}
TALK = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


def post(shared, body, path="/v1/completions", headers=JSON):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{shared.url}{path}", content=content, headers=headers, timeout=20)


def error_of(response, status: int) -> dict:
    """The error object, which has OpenAI's four fields and no other."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"model": "fake", "temperature": NaN}', "NaN"),
        (b'{"model": "fake", "temperature": -Infinity}', "-Infinity"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "fake", "prompt": "\\ud800"}', "surrogate"),
        (b"[" * 200000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_json_object(shared, raw, said):
    error = error_of(post(shared, raw), 400)
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": 1e999}, None, None),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
        ({"min_p": -1}, "min_p", "decimal_below_min_value"),
        ({"top_k": 2.0}, "top_k", "invalid_type"),
        ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 10**30}, "max_tokens", "integer_above_max_value"),
        ({"max_tokens": 255}, "prompt", "context_length_exceeded"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 100, "prompt": ["a", "b"]}, "prompt", "array_above_max_length"),
        ({"best_of": 3}, "best_of", "unsupported_value"),
        ({"suffix": "x"}, "suffix", "unsupported_value"),
        ({"echo": True, "logprobs": 1}, "logprobs", "unsupported_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": [1]}, "stop", "invalid_type"),
        ({"stop": {"a": 1}}, "stop", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "invalid_value"),
        ({"deadline_s": 0}, "deadline_s", "decimal_below_min_value"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"user": 7}, "user", "invalid_type"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [[]]}, "prompt", "empty_array"),
        ({"prompt": ["a", 1]}, "prompt", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [512]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": "fox " * 300}, "prompt", "context_length_exceeded"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": ["fake"]}, "model", "invalid_type"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(shared, change, param, code):
    before = len(shared.service.requests)
    body = json.dumps(GOOD | change).replace("Infinity", "1e999").encode()
    error = error_of(post(shared, body), 400)
    if param is None:
        param, code = "temperature", "invalid_value"
    assert (error["param"], error["code"]) == (param, code)
    assert len(shared.service.requests) == before


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "boss", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": [], "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "extra": 1}]},
            "messages[0].extra",
            "unknown_parameter",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"logprobs": 2}, "logprobs", "invalid_type"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
        ({"prompt": "x"}, "prompt", "unknown_parameter"),
        ({"max_tokens": 250}, "messages", "context_length_exceeded"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(shared, change, param, code):
    error = error_of(post(shared, TALK | change, "/v1/chat/completions"), 400)
    assert (error["param"], error["code"]) == (param, code)


def test_harmless_fields_of_openai_are_ignored(shared):
    harmless = {"metadata": {"a": "b"}, "service_tier": "auto", "store": False, "stop": None}
    talk = TALK | harmless | {"tools": [], "tool_choice": "none", "max_tokens": 2}
    assert post(shared, talk, "/v1/chat/completions").status_code == 200
    assert post(shared, GOOD | harmless | {"best_of": 1, "suffix": ""}).status_code == 200


def test_openai_raises_what_its_users_expect(shared):
    client = shared.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="fake", prompt="x", temperature=3)
    assert wrong.value.param == "temperature"


def test_other_urls_methods_and_types(shared):
    assert error_of(httpx.get(f"{shared.url}/v1/nothing"), 404)["code"] == "unknown_url"
    refused = httpx.get(f"{shared.url}/v1/completions")
    assert error_of(refused, 405)["code"] == "method_not_supported"
    assert refused.headers["allow"] == "POST"
    assert (
        "text/plain"
        in error_of(post(shared, GOOD, headers={"content-type": "text/plain"}), 415)["message"]
    )


def test_a_body_too_long_is_refused_said_or_not(tokenizer):
    with serving(tokenizer, limits=Limits(body_bytes=1000)) as running:
        long = GOOD | {"prompt": "fox " * 300}
        assert error_of(post(running, long), 413)["code"] == "request_too_large"

        def parts():
            for _ in range(40):
                yield b" " * 100

        url = f"{running.url}/v1/completions"
        unsaid = httpx.post(url, content=parts(), headers=JSON, timeout=20)
        assert error_of(unsaid, 413)["code"] == "request_too_large"
        assert post(running, GOOD).status_code == 200


def test_an_output_longer_than_the_server_gives(tokenizer):
    with serving(tokenizer, limits=Limits(output_tokens=10, choices=2)) as running:
        assert error_of(post(running, GOOD | {"max_tokens": 11}), 400)["param"] == "max_tokens"
        assert error_of(post(running, GOOD | {"n": 3}), 400)["param"] == "prompt"
        assert post(running, GOOD | {"max_tokens": 10, "n": 2}).status_code == 200


def test_api_keys(tokenizer):
    with serving(tokenizer, keys=frozenset({"one", "two"})) as running:
        for key in ("one", "two"):
            assert running.client(key).models.list().data[0].id == "fake"
        for key in ("three", "on", "ö"):
            response = httpx.get(
                f"{running.url}/v1/models", headers=[(b"authorization", f"Bearer {key}".encode())]
            )
            assert error_of(response, 401)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            running.client("no").completions.create(model="fake", prompt="x")
        assert error_of(post(running, GOOD), 401)["code"] == "invalid_api_key"
        assert not running.service.requests
        for open_to_all in ("/healthz", "/readyz", "/metrics", "/"):
            assert httpx.get(f"{running.url}{open_to_all}").status_code == 200


def test_a_full_queue_is_429_and_leaves_nothing_behind(tokenizer):
    """Six choices do not fit where four do: none is left in the queue."""
    with serving(tokenizer, slots=2, queue=2) as running:
        running.service.gate.clear()
        refused = post(running, GOOD | {"n": 6})
        error = error_of(refused, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "2"
        wait_until(lambda: running.service.busy == 0)
        running.service.gate.set()
        assert post(running, GOOD | {"n": 4}).status_code == 200
        running.service.gate.clear()
        client = running.client()
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="fake", prompt="x", n=5)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("localhost.", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("evil.example:127.0.0.1", 403),
        ("", 403),
    ],
)
def test_a_page_of_another_name_reads_nothing(tokenizer, name, status):
    with serving(tokenizer, names=LOOPBACK) as running:
        for path in ("/v1/models", "/metrics", "/stats", "/"):
            response = httpx.get(f"{running.url}{path}", headers={"host": name})
            assert response.status_code == status
            if status == 403:
                error = error_of(response, 403)
                assert (error["code"], error["type"]) == ("unknown_host", "permission_error")
                assert name in error["message"]


@pytest.mark.parametrize(
    ("sent", "before"),
    [(b"", False), (b"GET", False), (b"GET / HTTP/1.1\r\nhost: a", False), (b"GET", True)],
)
def test_headers_that_do_not_end_close_the_connection(tokenizer, sent, before):
    """On a new connection, and on one that has had an answer; meanwhile others are served."""
    whole = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    with serving(tokenizer, limits=Limits(stall_s=1.0)) as running:
        url = httpx.URL(running.url)
        with socket.create_connection((url.host, url.port), timeout=10) as connection:
            if before:
                connection.sendall(whole)
                answer = b""
                while not answer.endswith(b'{"status":"ok"}'):  # in as many parts as it comes
                    part = connection.recv(4096)
                    assert part
                    answer += part
            connection.sendall(sent)
            assert httpx.get(f"{running.url}/healthz").status_code == 200
            assert connection.recv(4096) == b""


def test_a_request_longer_than_the_limit_on_headers_is_not_cut_off(tokenizer):
    with serving(tokenizer, limits=Limits(stall_s=0.6), step_s=0.1) as running:
        assert post(running, GOOD | {"max_tokens": 12}).json()["usage"]["completion_tokens"] == 12
