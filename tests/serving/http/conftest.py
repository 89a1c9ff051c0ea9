"""A running server on the fake service, and OpenAI's client for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai
import pytest
import tokenizers
from fake_service import FakeService
from starlette.applications import Starlette

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import Tokenizer, build_tokenizer
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.http.model import Model
from tpu_stack.serving.http.server import Server, address_of, bind

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Running:
    """A server in a thread, and what it was made of."""

    url: str
    host: Host
    service: FakeService
    server: Server
    thread: threading.Thread
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def host_app(self) -> Starlette:
        """The application, to which a test may add a route."""
        app = self.server.config.app
        assert isinstance(app, Starlette)
        return app

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's client, which does not retry."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)
        self.clients.append(made)
        return made


def wait_until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Polls until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@contextmanager
def serving(
    tokenizer: Tokenizer,
    *,
    limits: Limits | None = None,
    keys: frozenset[str] = frozenset(),
    chat: ChatFormat | None = None,
    drain_s: float = 10,
    **service: object,
) -> Iterator[Running]:
    """Runs a server for the time of a `with` block."""
    fake = FakeService(**service)  # pyright: ignore[reportArgumentType]
    model = Model("fake", fake, tokenizer, chat or ChatFormat())
    host = Host(model, limits or Limits(), keys)
    listener = bind("127.0.0.1", 0)
    server = Server(host, drain_s)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    running = Running(address_of(listener), host, fake, server, thread)
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        server.drain()
        server.drain()
        thread.join(timeout=10)
        fake.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level, with the special tokens of ChatML."""
    text = "the quick brown fox jumps over the lazy dog. " * 20
    plain = build_tokenizer("bpe:300", [Document(text, "text")])
    backend = tokenizers.Tokenizer.from_str(plain.definition)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer.from_json(backend.to_str())


@pytest.fixture(scope="session")
def chatml(tokenizer) -> ChatFormat:
    """ChatML, which ends an answer with `<|im_end|>`."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.definition)
    end = backend.token_to_id("<|im_end|>")
    assert end is not None
    return ChatFormat(CHATML, eos_token="<|im_end|>", stop_tokens=(end,))


@pytest.fixture(scope="module")
def shared(tokenizer, chatml) -> Iterator[Running]:
    """A server that a module's tests share; they leave it as they found it."""
    with serving(tokenizer, chat=chatml) as running:
        yield running
