"""The routes of a server, around one model; which engine answers is not known here.

Example:
    app = build_app(Host(Model("a-int4", service, bundle.tokenizer, bundle.chat)))
"""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio.to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from tpu_stack.serving.http.answer import CLIENT_LEFT, Reply, respond
from tpu_stack.serving.http.chat import read_chat
from tpu_stack.serving.http.completions import read_completion
from tpu_stack.serving.http.errors import ApiError, draining
from tpu_stack.serving.http.fields import parse_body
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.http.host_names import HostNames
from tpu_stack.serving.http.limits import Limits
from tpu_stack.serving.http.page import page_response

_INLINE_BYTES = 16384
"""Bodies up to this size are read on the event loop; tokenizing more would hold up others."""

_CLOSE = {"Connection": "close"}

Reader = Callable[[Host, dict[str, Any]], Reply]
Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(host: Host) -> Starlette:
    """An ASGI application. Its `state.host` is `host`."""
    generate = {"/v1/completions": read_completion, "/v1/chat/completions": read_chat}
    routes = [
        Route("/v1/models", partial(_models, host)),
        Route("/v1/models/{id:path}", partial(_model, host)),
        *(
            Route(path, partial(_generate, host, reader), methods=["POST"])
            for path, reader in generate.items()
        ),
        Route("/healthz", _healthz),
        Route("/readyz", partial(_readyz, host)),
        Route("/metrics", partial(_metrics, host)),
        Route("/stats", partial(_stats, host)),
        Route("/", partial(_page, host)),
    ]
    known = {path: path for path in (*generate, "/v1/models", "/healthz", "/readyz", "/metrics")}
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failed},
    )
    app.state.host = host
    if host.names is not None:
        app.add_middleware(HostNames, names=host.names)
    app.add_middleware(_Counted, host=host, known=known | {"/": "/", "/stats": "/stats"})
    return app


class _Counted:
    """Counts responses by route and status; sees every one, errors of the framework too."""

    def __init__(self, app: Any, host: Host, known: dict[str, str]):
        self._app, self._host, self._known = app, host, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception:
            status = 500  # the outermost layer answers it
            raise
        finally:
            path = scope["path"]
            model = "/v1/models" if path.startswith("/v1/models/") else "other"
            self._host.metrics.response(self._known.get(path, model), status)


def _let_in(host: Host, request: Request) -> None:
    """Raises ApiError 401 unless the request carries one of the server's keys."""
    if not host.keys:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip().encode("utf-8", errors="replace")
    matches = [hmac.compare_digest(given, known.encode("utf-8")) for known in host.keys]
    if kind.lower() != "bearer" or not any(matches):
        what = "Incorrect API key provided." if given else "You didn't provide an API key."
        message = f"{what} Send it as 'Authorization: Bearer KEY'."
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, code="invalid_api_key", headers=headers)


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body. Raises ApiError 413 as soon as it is known to be too long, 415 if no JSON, 408
    when it does not come."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A web page of another origin may send any other type without asking first.
        raise ApiError(415, f"The content type is {kind[:80]!r}; send application/json.")
    message = f"The body is longer than {limits.body_bytes} bytes, the most this server takes."
    too_long = ApiError(413, message, code="request_too_large", headers=_CLOSE)
    length = request.headers.get("content-length", "0")
    if re.fullmatch("[0-9]+", length) and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.stall_s):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise too_long
                parts.append(part)
    except TimeoutError as error:
        message = f"The body did not arrive within {limits.stall_s:g} s."
        raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from error
    return b"".join(parts)


async def _generate(host: Host, reader: Reader, request: Request) -> Response:
    _let_in(host, request)
    if host.draining:
        raise draining()
    raw = await _read_body(request, host.limits)
    if len(raw) <= _INLINE_BYTES:
        reply = reader(host, parse_body(raw))
    else:
        reply = await anyio.to_thread.run_sync(lambda: reader(host, parse_body(raw)))
    return await respond(request, host, reply)


async def _models(host: Host, request: Request) -> Response:
    _let_in(host, request)
    return JSONResponse({"object": "list", "data": [host.model.to_json()]})


async def _model(host: Host, request: Request) -> Response:
    _let_in(host, request)
    host.model.check_id(request.path_params["id"])
    return JSONResponse(host.model.to_json())


async def _healthz(request: Request) -> Response:
    """Whether the process lives."""
    return JSONResponse({"status": "ok"})


async def _readyz(host: Host, request: Request) -> Response:
    """Whether requests are taken."""
    ready = not host.draining
    return JSONResponse({"status": "ready" if ready else "draining"}, 200 if ready else 503)


async def _metrics(host: Host, request: Request) -> Response:
    return Response(host.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


async def _stats(host: Host, request: Request) -> Response:
    body = {"model": host.model.id, "draining": host.draining, **host.metrics.snapshot()}
    return JSONResponse(body | {"engine": host.model.service.describe()})


async def _page(host: Host, request: Request) -> Response:
    return page_response(host)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in the same form."""
    assert isinstance(error, HTTPException)
    path, code = request.url.path[:100], "unknown_url"
    message = f"Unknown request URL: {request.method} {path}."
    if error.status_code == 405:
        message, code = f"Not allowed to {request.method} on {path}.", "method_not_supported"
    shown = ApiError(error.status_code, message, code=code)
    return JSONResponse(shown.body(), error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A bug: said to the client without its details, which are in the log."""
    shown = ApiError(500, "The server failed to answer this request.", code="internal_error")
    return JSONResponse(shown.body(), 500)
