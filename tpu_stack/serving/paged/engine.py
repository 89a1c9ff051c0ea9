"""The engine's loop: admit, prefill a chunk, decode a step, hand out tokens; nobody is lost.

One step is always on its way while the host reads the tokens of the one before. When pages run
out, the sequence that ranks last leaves with its pages saved on the host, and comes back exactly
as it was. A sequence's tokens do not depend on the others: every program has a fixed shape, and a
row reads its own pages only.

>>> engine = PagedEngine(programs, params)
>>> engine.submit(ticket, listener)
>>> while engine.step(): ...
"""

import time
from collections import Counter, deque
from typing import Any, Literal

import numpy as np

from tpu_stack.serving.paged.pool import PagePool
from tpu_stack.serving.paged.programs import Programs
from tpu_stack.serving.paged.sequence import (
    OUTPUT_WEIGHT,
    PROMPT_WEIGHT,
    Sequence,
    WaitingQueue,
)
from tpu_stack.serving.paged.state import StepOutput, arrivals_of
from tpu_stack.serving.requests import Finished, FinishReason, Restarted, Token
from tpu_stack.serving.service import Listener, Stats, Ticket

InFlight = Literal["finish", "restart"]
Sent = tuple[StepOutput, list[tuple[int, Sequence]]]


class PagedEngine:
    """Sequences, pages and slots of one set of programs. Not thread-safe: one thread steps it."""

    def __init__(self, programs: Programs, params: Any):
        self.programs, self.params, self.shapes = programs, params, programs.shapes
        self.pool = PagePool(self.shapes.pages, self.shapes.page)
        self.queue = WaitingQueue()
        self._rows: list[Sequence | None] = [None] * self.shapes.slots
        self._tables = np.zeros((self.shapes.slots, self.shapes.entries), np.int32)
        self._sent: deque[Sent] = deque()
        self._next: tuple[Any, InFlight] | None = None
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._seconds = {"step_s": 0.0, "host_s": 0.0}

    # What clients ask -------------------------------------------------------------------------

    def submit(self, ticket: Ticket, listener: Listener) -> Sequence:
        """Queues a request that `GenerationRequest.check` has passed."""
        prompt = ticket.request.prompt
        sequence = Sequence(ticket, listener, list(prompt), self.pool.names(prompt))
        self.queue.add(sequence)
        self._counters["submitted"] += 1
        return sequence

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled", detail: str = ""):
        """Ends a sequence wherever it is; nothing happens when it has ended."""
        if not sequence.done:
            self._finish(sequence, reason, detail)

    def load(self, params: Any, in_flight: InFlight) -> None:
        """Replaces the weights between two steps.

        Sequences in flight finish on the old ones, while new ones wait; or all start anew.
        """
        self._next = (params, in_flight)

    @property
    def running(self) -> list[Sequence]:
        """Sequences in slots, prefilling or decoding."""
        return [sequence for sequence in self._rows if sequence is not None]

    def stats(self) -> Stats:
        """A snapshot, but for what the service counts."""
        return Stats(
            waiting=len(self.queue),
            running=len(self.running),
            slots=self.shapes.slots,
            pages=self.pool.total,
            pages_free=self.pool.free,
            pages_cached=self.pool.kept,
            finished=dict(self._finished),
            programs=self.programs.compiled,
            recompilations=self.programs.recompilations,
            **self._seconds,
            **self._counters,
        )

    # One round of the loop --------------------------------------------------------------------

    def step(self) -> bool:
        """One round; False when there was nothing to do."""
        started, waited = time.perf_counter(), 0.0
        self._expire()
        self._replace_weights()
        self._admit()
        worked = self._prefill()
        worked |= self._decode()
        while len(self._sent) > (1 if worked else 0):
            waited += self._read_oldest()
            worked = True
        if worked:
            took = time.perf_counter() - started
            self._seconds["step_s"] += took
            self._seconds["host_s"] += took - waited
        return worked or bool(self.running)

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in (*self.queue, *self.running):
            limit = sequence.request.deadline_s
            if limit is not None and now - sequence.submitted > limit:
                self._finish(sequence, "deadline")

    def _replace_weights(self) -> None:
        if self._next is None:
            return
        params, in_flight = self._next
        begun = self.running or self.queue.best(begun=True)
        if in_flight == "finish" and begun:
            return
        self._drain()
        for sequence in self.running:
            self._leave(sequence)
            self._restart(sequence)
            self.queue.add(sequence, first=True)
        for sequence in self.queue:  # preempted ones hold what the old weights computed
            if sequence.saved is not None:
                self._restart(sequence)
        self.pool.flush()
        self.params, self._next = params, None
        self._counters["generation"] += 1

    def _restart(self, sequence: Sequence) -> None:
        sequence.saved = None
        sequence.computed = sequence.cached = 0
        if sequence.new_tokens:
            sequence.tokens = list(sequence.request.prompt)
            sequence.listener(Restarted())

    # Admission --------------------------------------------------------------------------------

    def _admit(self) -> None:
        old_weights = self._next is not None  # only those that began with them go on
        while (best := self.queue.best(begun=old_weights)) is not None:
            if not self._make_room(best):
                return
            self.queue.remove(best)
            best.slot = self._rows.index(None)
            self._rows[best.slot] = best
            self._tables[best.slot] = 0
            self._enter_pages(best)
            if best.saved is not None:
                self._resume(best)

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether there is a slot, and pages are held for it; lower priorities make way."""
        while None not in self._rows or not self._hold_pages(sequence):
            victim = max(self.running, key=lambda each: each.rank, default=None)
            if victim is None or victim.request.priority <= sequence.request.priority:
                return False
            self._preempt(victim)
        return True

    def _hold_pages(self, sequence: Sequence) -> bool:
        """Takes the pages of all tokens so far and one more, some of them other sequences'."""
        shared = [] if sequence.saved is not None else self.pool.shared(sequence.names)
        self.pool.take(shared)
        wanted = self._pages_for(min(len(sequence.tokens) + 1, self.shapes.length)) - len(shared)
        fresh = self.pool.allocate(wanted)
        if fresh is None:
            self.pool.release(shared)
            return False
        for page in fresh:
            page.owner = sequence
        sequence.pages = [*shared, *fresh]
        if sequence.saved is None:
            count = len(sequence.names)
            self.pool.name(sequence.pages[len(shared) : count], sequence.names[len(shared) :])
        return True

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.shapes.page)

    def _enter_pages(self, sequence: Sequence) -> None:
        self._tables[sequence.slot, : len(sequence.pages)] = [page.id for page in sequence.pages]

    def _resume(self, sequence: Sequence) -> None:
        ids = [page.id for page in sequence.pages[: self._pages_for(len(sequence.tokens) - 1)]]
        self.programs.restore(ids, sequence.saved)
        sequence.saved = None
        self._insert(None, 1, [sequence])

    # Prefill ----------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """One chunk of the first prompts in rank that can go on."""
        waiting = sorted((s for s in self.running if not s.decoding), key=lambda s: s.rank)
        waiting = [sequence for sequence in waiting if self._can_compute(sequence)]
        if not waiting:
            return False
        chunk = self._chunk(waiting[0])
        batch = [s for s in waiting if self._chunk(s) == chunk][: max(self.shapes.rows)]
        rows = min(rows for rows in self.shapes.rows if rows >= len(batch))
        tokens = np.zeros((rows, chunk), np.int32)
        starts, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        tables = np.zeros((rows, self.shapes.entries), np.int32)
        for row, sequence in enumerate(batch):
            part = sequence.request.prompt[sequence.computed : sequence.computed + chunk]
            tokens[row, : len(part)], lengths[row] = part, len(part)
            starts[row], tables[row] = sequence.computed, self._tables[sequence.slot]
        logits = self.programs.prefill(self.params, tokens, starts, lengths, tables)
        for sequence, length in zip(batch, lengths, strict=False):
            self._computed(sequence, int(length))
        done = [s if s.computed == len(s.request.prompt) else None for s in batch]
        if any(done):
            self._insert(logits, rows, done)
        self._counters["prefill_steps"] += 1
        return True

    def _chunk(self, sequence: Sequence) -> int:
        left = len(sequence.request.prompt) - sequence.computed
        return next((c for c in self.shapes.chunks if c >= left), self.shapes.chunks[-1])

    def _can_compute(self, sequence: Sequence) -> bool:
        """Skips pages that are ready; False while somebody else computes the next one.

        Pages that nobody computes any more, because their owner left, are taken over.
        """
        page = self.shapes.page
        while sequence.computed % page == 0 and sequence.computed // page < len(sequence.names):
            held = sequence.pages[sequence.computed // page]
            if held.owner is sequence or not (held.ready or held.owner is not None):
                break
            if not held.ready:
                return False
            sequence.computed += page
            sequence.cached += page
        for held in sequence.pages[sequence.computed // page :]:
            if held.owner is None:
                held.owner = sequence
        return True

    def _computed(self, sequence: Sequence, tokens: int) -> None:
        first = sequence.computed // self.shapes.page
        sequence.computed += tokens
        for page in sequence.pages[first : sequence.computed // self.shapes.page]:
            page.ready = True
        self.queue.charge(sequence.request.client, PROMPT_WEIGHT * tokens)

    def _insert(self, logits: Any, rows: int, sequences: list[Sequence | None]) -> None:
        """Gives prompts that are done, and sequences that resume, their rows of the batch."""
        entries: list[tuple[int, list[int], int, Any]] = [
            (self.shapes.slots, [0], 1, None)
            if s is None or s.slot is None
            else (s.slot, s.tokens, len(s.request.prompt), s.request.sampling)
            for s in sequences
        ]
        vocab = self.programs.config.vocab_size
        shapes = self.shapes
        arrivals = arrivals_of(shapes.slots, shapes.length, vocab, rows, entries)
        output = self.programs.insert(logits, arrivals)
        fresh = [(r, s) for r, s in enumerate(sequences) if s is not None and not s.new_tokens]
        for sequence in sequences:
            if sequence is not None:
                sequence.decoding = True
        for _, sequence in fresh:
            sequence.pending = 1
            self._counters["prompt_tokens"] += len(sequence.request.prompt)
            self._counters["cached_prompt_tokens"] += sequence.cached
        if fresh:
            self._sent.append((output, fresh))

    # Decode -----------------------------------------------------------------------------------

    def _decode(self) -> bool:
        """One step of every row that is not sure to be at its end."""
        for sequence in sorted(self.running, key=lambda s: s.rank):
            if sequence.slot is not None and self._goes_on(sequence):
                self._cover(sequence)
        batch = [(s.slot, s) for s in self.running if s.slot is not None and self._goes_on(s)]
        if not batch:
            return False
        active = np.zeros(self.shapes.slots, bool)
        for slot, sequence in batch:
            active[slot] = True
            sequence.pending += 1 + self.shapes.guesses
        output = self.programs.decode(self.params, self._tables.copy(), active)
        self._sent.append((output, batch))
        self._counters["decode_steps"] += 1
        self._counters["decode_rows"] += len(batch)
        return True

    def _limit(self, sequence: Sequence) -> int:
        request = sequence.request
        return min(len(request.prompt) + request.max_tokens, self.shapes.length)

    def _goes_on(self, sequence: Sequence) -> bool:
        known = len(sequence.tokens) + sequence.pending
        return sequence.decoding and known < self._limit(sequence)

    def _cover(self, sequence: Sequence) -> None:
        """Sees that the next step's keys have a page, if need be by preempting the last in rank."""
        while True:
            known = len(sequence.tokens) + sequence.pending + self.shapes.guesses
            missing = self._pages_for(min(known, self.shapes.length)) - len(sequence.pages)
            if missing <= 0:
                return
            fresh = self.pool.allocate(missing)
            if fresh is not None:
                for page in fresh:
                    page.owner = sequence
                sequence.pages += fresh
                self._enter_pages(sequence)
                return
            victim = max(self.running, key=lambda each: each.rank)
            self._preempt(victim)
            if sequence.slot is None or not self._goes_on(sequence):
                return

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence out of its slot, its pages kept on the host, and queues it again."""
        self._drain()
        if sequence.slot is None:
            return  # its last token was among those just read
        if sequence.decoding:
            ids = [page.id for page in sequence.pages[: self._pages_for(len(sequence.tokens) - 1)]]
            sequence.saved = self.programs.save(ids)
        else:
            sequence.computed = sequence.cached = 0
        self._leave(sequence)
        self.queue.add(sequence, first=True)
        self._counters["preempted"] += 1

    # Results ----------------------------------------------------------------------------------

    def _drain(self) -> None:
        while self._sent:
            self._read_oldest()

    def _read_oldest(self) -> float:
        """Hands out one step's tokens; the seconds waited for them."""
        output, batch = self._sent.popleft()
        started = time.perf_counter()
        tokens, counts = np.asarray(output.tokens), np.asarray(output.counts)
        guessed = np.asarray(output.guessed)
        waited = time.perf_counter() - started
        details = None
        if any(s.request.sampling.logprobs is not None for _, s in batch):
            arrays = (output.logprobs, output.top_ids, output.top_logprobs)
            details = tuple(map(np.asarray, arrays))
        for row, sequence in batch:
            sequence.pending -= tokens.shape[1]
            self._counters["drafted"] += int(guessed[row])
            self._counters["accepted"] += max(0, int(counts[row]) - 1)
            for t in range(int(counts[row])):
                if sequence.done:
                    break
                self._hand_out(sequence, int(tokens[row, t]), details, row, t)
        return waited

    def _hand_out(self, sequence: Sequence, token: int, details: Any, row: int, t: int) -> None:
        if token in sequence.request.stop_tokens:
            return self._finish(sequence, "stop")
        sequence.tokens.append(token)
        self._counters["new_tokens"] += 1
        self.queue.charge(sequence.request.client, OUTPUT_WEIGHT)
        wanted = sequence.request.sampling.logprobs
        if wanted is None or details is None:
            sequence.listener(Token(token))
        else:
            logprobs, ids, tops = (array[row, t] for array in details)
            top = tuple(
                (int(i), float(p)) for i, p in zip(ids[:wanted], tops[:wanted], strict=True)
            )
            sequence.listener(Token(token, float(logprobs), top))
        if len(sequence.tokens) >= self._limit(sequence):
            self._finish(sequence, "length")
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        if sequence.slot is None:
            self.queue.remove(sequence)
        else:
            self._leave(sequence)
        sequence.done, sequence.saved = True, None
        self._finished[reason] += 1
        prompt = len(sequence.request.prompt)
        event = Finished(reason, prompt, sequence.new_tokens, sequence.cached, detail)
        sequence.listener(event)

    def _leave(self, sequence: Sequence) -> None:
        """Gives back the slot and the pages."""
        for page in sequence.pages:
            if page.owner is sequence:
                page.owner = None
        self.pool.release(sequence.pages)
        assert sequence.slot is not None
        self._rows[sequence.slot] = None
        sequence.slot, sequence.pages = None, []
        sequence.decoding, sequence.pending = False, 0
