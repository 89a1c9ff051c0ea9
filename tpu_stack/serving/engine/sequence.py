"""One request inside the engine, and the order in which waiting ones are served.

Example:
    queue = WaitingQueue()
    queue.add(sequence)
    queue.best()
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tpu_stack.serving.engine.block_pool import Block
from tpu_stack.serving.requests import GenerationRequest
from tpu_stack.serving.service import Listener, Ticket

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a token costs a client, as in Sheng et al. 2023 (arXiv:2401.00588)."""


@dataclass(eq=False)
class Sequence:
    """The state of one request in the engine.

    Attributes:
      tokens: prompt and output so far. blocks: of its tokens, in order. block_hashes: of the
        prompt's blocks that it may share.
      computed: prompt tokens whose keys and values are in the cache. cached: those of them that
        the prefix cache had.
      slot: its row of the batch. decoding: past its prompt.
      pending: new tokens, at most, of steps that were dispatched.
      swapped: what its blocks held, on the host, while preempted.
      scores: of a prompt that is scored, the chunks so far: (log-probabilities on the device, row,
        tokens).
    """

    ticket: Ticket
    listener: Listener
    tokens: list[int]
    block_hashes: list[bytes]
    submitted: float = field(default_factory=time.monotonic)
    blocks: list[Block] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    slot: int | None = None
    decoding: bool = False
    done: bool = False
    pending: int = 0
    swapped: Any = None
    scores: list[tuple[Any, int, int]] = field(default_factory=list)

    @property
    def request(self) -> GenerationRequest:
        """What was asked."""
        return self.ticket.request

    @property
    def new_tokens(self) -> int:
        """Tokens of the output so far."""
        return len(self.tokens) - len(self.request.prompt)

    def restart_prefill(self) -> None:
        """Forgets what was computed of the prompt."""
        self.computed = self.cached = 0
        self.scores = []

    @property
    def rank(self) -> tuple[int, int]:
        """Lower is served first and preempted last."""
        return self.request.priority, self.ticket.number


class WaitingQueue:
    """Waiting sequences: by priority, then the client that was served least, then arrival."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], deque[Sequence]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for line in self._lines.values() for sequence in line)

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queues it; `first` puts one that was preempted before its client's others.

        A client that comes (back) starts level with the one that has had least among those
        waiting, so that no client saves up a claim by being away.
        """
        request = sequence.request
        waiting = {client for _, client in self._lines}
        if request.client not in waiting and waiting:
            floor = min(self._served.get(client, 0.0) for client in waiting)
            self._served[request.client] = max(self._served.get(request.client, 0.0), floor)
        line = self._lines.setdefault((request.priority, request.client), deque())
        (line.appendleft if first else line.append)(sequence)

    def best(self, *, begun: bool = False) -> Sequence | None:
        """The one to serve next, of those that were preempted when `begun`; it stays queued."""
        heads = (
            next((s for s in line if s.swapped is not None or not begun), None)
            for line in self._lines.values()
        )
        return min((head for head in heads if head is not None), key=self._order, default=None)

    def _order(self, sequence: Sequence) -> tuple[int, float, tuple[int, int]]:
        request = sequence.request
        return request.priority, self._served.get(request.client, 0.0), sequence.rank

    def remove(self, sequence: Sequence) -> None:
        """Takes it out; ValueError when it is not in."""
        key = (sequence.request.priority, sequence.request.client)
        self._lines[key].remove(sequence)
        if not self._lines[key]:
            del self._lines[key]

    def charge(self, client: str, tokens: float) -> None:
        """Notes what a client had."""
        self._served[client] = self._served.get(client, 0.0) + tokens
