"""Which names a server answers to, so that no web page reaches it under a name of its own.

A page of evil.example may have that name resolve to 127.0.0.1; the browser then takes the server
for the page's own, and lets it read what it likes ("DNS rebinding"). Its requests carry the name.

    app.add_middleware(HostNames, names=frozenset({"localhost"}))
"""

import re
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tpu_stack.serving.http.errors import ApiError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_PORT = re.compile(r":[0-9]*$")


class HostNames:
    """Answers 403 to a request whose Host header has another name; the port does not matter."""

    def __init__(self, app: Any, names: frozenset[str]):
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            if _PORT.sub("", given).lower().rstrip(".") not in self._names:
                error = refused(given)
                await JSONResponse(error.body(), error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def refused(given: str) -> ApiError:
    """What a client is told that calls the server by another name."""
    message = f"This server does not answer to the host name {given[:100]!r}."
    return ApiError(403, message, code="unknown_host")
