"""From a call to an HTTP answer, whole or streamed; a client that leaves ends its call.

Example:
    return await respond(request, host, reply)
"""

import asyncio
import json
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tpu_stack.serving.http.call import Call, Update, Usage
from tpu_stack.serving.http.errors import ApiError
from tpu_stack.serving.http.host import Host
from tpu_stack.serving.requests import GenerationRequest

CLIENT_LEFT = 499
"""The status that is counted, and never seen, when a client has left (nginx's custom)."""


class Format(Protocol):
    """How one route writes its answers. Every method returns JSON-ready objects."""

    def whole(self, choices: list[Update], usage: Usage) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def openings(self, choices: int) -> list[dict[str, Any]]:
        """The chunks before the first token."""
        ...

    def chunk(self, update: Update) -> dict[str, Any]:
        """A chunk of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk of a stream, where it is asked for."""
        ...


@dataclass(frozen=True)
class Reply:
    """An answer to be given: its sequences, its stop strings and its form."""

    requests: Sequence[GenerationRequest]
    stops: Sequence[str]
    format: Format
    stream: bool
    include_usage: bool


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


async def respond(request: Request, host: Host, reply: Reply) -> Response:
    """Submits a reply's sequences and answers. Raises ApiError."""
    call = Call.submit(host, reply.requests, reply.stops)
    if reply.stream:
        return EventStream(call, reply, host.limits.stall_s)
    async with call:
        collected = await unless_gone(_collect(call, len(reply.requests)), request.receive)
        if collected is None:
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(reply.format.whole(collected, call.usage))


async def unless_gone[T](work: Awaitable[T], receive: Receive) -> T | None:
    """The result of `work`, or None when the client leaves first; then `work` is cancelled."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_client_leaves(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _collect(call: Call, count: int) -> list[Update]:
    choices = [Update(index) for index in range(count)]
    async for update in call:
        choices[update.index] = choices[update.index].then(update)
    return choices


class EventStream(Response):
    """A call as server-sent events, with `data: [DONE]` at the end; errors are events too."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, reply: Reply, stall_s: float):
        self._call, self._reply, self._stall_s = call, reply, stall_s
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the call ends, the client leaves, or it takes nothing for `stall_s`."""
        async with self._call:
            await unless_gone(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await self._send_updates(send)
        except ApiError as error:
            await self._event(send, error.body())
        except TimeoutError:
            return  # the connection is closed, for the response is incomplete
        await self._bytes(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_updates(self, send: Send) -> None:
        form, begun = self._reply.format, set()
        for opening in form.openings(len(self._reply.requests)):
            await self._event(send, opening)
        async for update in self._call:
            if update.restarted and update.index in begun:
                message = "the model's weights were replaced, and the text so far is void; retry"
                raise ApiError(503, message, code="model_replaced")
            if update.text or update.tokens or update.finish:
                begun.add(update.index)
                await self._event(send, form.chunk(update))
        if self._reply.include_usage:
            await self._event(send, form.usage_chunk(self._call.usage))

    async def _event(self, send: Send, body: dict[str, Any]) -> None:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        await self._bytes(send, b"data: " + text.encode("utf-8") + b"\n\n")

    async def _bytes(self, send: Send, data: bytes) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": True}
        async with asyncio.timeout(self._stall_s):
            await send(message)
