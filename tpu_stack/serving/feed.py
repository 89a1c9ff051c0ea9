"""Any number of requests through a service's bounded queue, by a caller in the same process.

with Feed(service, requests, listen) as feed:
    while feed.open:
        feed.ended(events.get())
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

from tpu_stack.serving.requests import Event, Finished, GenerationRequest, QueueFull
from tpu_stack.serving.service import Service, Ticket


class Feed:
    """Submits requests in order, as many at a time as the queue takes.

    On leaving its `with` statement, requests that have not ended are cancelled.

    Args:
      listen: called with a request's index and each of its events, on the engine's thread.
    """

    def __init__(
        self,
        service: Service,
        requests: Sequence[GenerationRequest],
        listen: Callable[[int, Event], None],
    ):
        self._service, self._requests, self._listen = service, requests, listen
        self._tickets: list[Ticket] = []
        self._ended = 0

    @property
    def open(self) -> int:
        """Requests that have not ended, submitted or not."""
        return len(self._requests) - self._ended

    def ended(self, event: Finished) -> None:
        """The caller has seen a request end; submits more.

        Raises RuntimeError where the engine failed, or cancelled a request by closing.
        """
        if event.reason == "error":
            raise RuntimeError(f"the engine failed: {event.detail}")
        if event.reason == "cancelled":
            raise RuntimeError("the engine was closed before every request had ended")
        self._ended += 1
        self._fill()

    def _fill(self) -> None:
        while (row := len(self._tickets)) < len(self._requests):
            try:
                ticket = self._service.submit(self._requests[row], partial(self._listen, row))
            except QueueFull as full:
                if row > self._ended:
                    return
                time.sleep(full.retry_after_s)  # others fill the queue
            else:
                self._tickets.append(ticket)

    def _cancel(self) -> None:
        if not self.open:
            return
        for ticket in self._tickets:
            self._service.cancel(ticket)

    def __enter__(self) -> Self:
        try:
            self._fill()
        except BaseException:
            self._cancel()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._cancel()
