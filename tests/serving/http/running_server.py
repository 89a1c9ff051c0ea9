"""A server on the fake service, running in a thread, and OpenAI's client for it."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
from fake_service import FakeService
from starlette.applications import Starlette

from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.http.model import Model
from tpu_stack.serving.http.server import Server, address_of, bind


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
    names: frozenset[str] | None = None,
    drain_s: float = 10,
    engine: Any = None,
    **service: object,
) -> Iterator[Running]:
    """Runs a server for the time of a `with` block, on `engine` where a test brings a real one."""
    fake = engine or FakeService(**service)  # pyright: ignore[reportArgumentType]
    model = Model("fake", fake, tokenizer, chat or ChatFormat())
    host = Host(model, limits or Limits(), keys, names)
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
