"""Runs the application on a socket, and ends it without dropping anybody.

The first SIGTERM or Ctrl-C begins the drain: new requests are answered 503, those in flight finish,
up to `drain_s`; then the process may exit with status 0. A second one ends it at once.

    listener = bind("127.0.0.1", 0)
    Server(host, drain_s=30).run(sockets=[listener])
"""

import errno
import socket
import time
from types import FrameType

import uvicorn

from tpu_stack.errors import UserError
from tpu_stack.serving.http.app import build_app
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.http.protocol import protocol_with

_CLOSE_S = 5
"""Seconds that connections get to take their last bytes once every call has ended."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address is taken or not ours.

    Called before a model is loaded: a port in use is known at once.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; it must lie in 0 to 65535 (0 picks a free one)")
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"{host} port {port} is in use; choose another --port, or 0 for a free one"
            raise UserError(message) from error
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    name, port = listener.getsockname()[:2]
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Server(uvicorn.Server):
    """Uvicorn with a drain. `run` returns when the server has ended."""

    def __init__(self, host: Host, drain_s: float = 30.0):
        config = uvicorn.Config(
            build_app(host),
            http=protocol_with(host.limits.stall_s),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_CLOSE_S,
        )
        super().__init__(config)
        self._host, self._drain_s = host, drain_s
        self._deadline: float | None = None

    def drain(self) -> None:
        """Begins the drain; may be called from a signal handler or another thread."""
        self._host.begin_drain()
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if self._deadline is None:
            self.drain()
        else:
            self._deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether the server is done."""
        if self._deadline is not None:
            late = time.monotonic() >= self._deadline
            if late:
                self._host.end_calls()
            if late or not self._host.calls:
                self.should_exit = True
        return await super().on_tick(counter)
