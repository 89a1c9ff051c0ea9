"""The engine's loop: admit, prefill a chunk, decode a step, hand out tokens; nobody is lost.

One step is always on its way while the host reads the tokens of the one before. When pages run
out, the sequence that ranks last leaves with its pages saved on the host, and comes back exactly
as it was. A sequence's tokens do not depend on the others: every program has a fixed shape, and a
row reads its own pages only.

>>> engine = Engine(programs, params)
>>> engine.submit(ticket, listener)
>>> while engine.step(): ...
"""

import time
from collections import Counter, deque
from typing import Any

import numpy as np

from tpu_stack.serving.engine.batches import arrivals, next_chunk
from tpu_stack.serving.engine.pool import PagePool
from tpu_stack.serving.engine.programs import Prefilled, Programs
from tpu_stack.serving.engine.residents import Residents
from tpu_stack.serving.engine.results import Results
from tpu_stack.serving.engine.sequence import (
    OUTPUT_WEIGHT,
    PROMPT_WEIGHT,
    Sequence,
    WaitingQueue,
)
from tpu_stack.serving.engine.two_meshes import TwoMeshes
from tpu_stack.serving.requests import Finished, FinishReason, Restarted
from tpu_stack.serving.service import InFlight, Listener, Stats, Ticket


class Engine:
    """Sequences, pages and slots of one set of programs. Not thread-safe: one thread steps it."""

    def __init__(self, programs: Programs | TwoMeshes, params: Any):
        self.programs, self.params, self.shapes = programs, params, programs.shapes
        self.residents = Residents(self.shapes)
        self.queue = WaitingQueue()
        self._landing: deque[tuple[Prefilled, list[Sequence], list[Sequence | None]]] = deque()
        self._next: tuple[Any, InFlight] | None = None
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._seconds = {"step_s": 0.0, "host_s": 0.0}
        self._results = Results(self.shapes, self._counters, self._finish, self._charge_output)

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
    def pool(self) -> PagePool:
        """The pages of the key/value cache."""
        return self.residents.pool

    @property
    def running(self) -> list[Sequence]:
        """Sequences in slots, prefilling or decoding."""
        return self.residents.all

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
        self._land(wait=not worked and not any(s.decoding for s in self.running))
        worked |= self._decode()
        while len(self._results) > (1 if worked else 0):
            waited += self._results.read_oldest()
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
        self.drain()
        for sequence in self.running:
            self.residents.leave(sequence)
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
            self.residents.seat(best)
            if best.saved is not None:
                self.programs.restore(self.residents.filled_pages(best), best.saved)
                best.saved = None
                self._insert(None, 1, [best])

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether there is a slot, and pages are held for it; lower priorities make way."""
        while not self.residents.has_slot or not self.residents.hold(sequence):
            victim = max(self.running, key=lambda each: each.rank, default=None)
            if victim is None or victim.request.priority <= sequence.request.priority:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence out of its slot, its pages kept on the host, and queues it again."""
        self.drain()
        if sequence.slot is None:
            return  # its last token was among those just read
        if sequence.decoding:
            sequence.saved = self.programs.save(self.residents.filled_pages(sequence))
        else:
            sequence.computed = sequence.cached = 0
        self.residents.leave(sequence)
        self.queue.add(sequence, first=True)
        self._counters["preempted"] += 1

    # Prefill ----------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """One chunk of the first prompts in rank that can go on."""
        able = [s for s in sorted(self.running, key=lambda s: s.rank) if self._prefills(s)]
        if not able:
            return False
        batch, arrays = next_chunk(able, self.residents.tables, self.shapes)
        prefilled = self.programs.prefill(self.params, *arrays)
        for sequence, length in zip(batch, arrays.lengths, strict=False):
            self.residents.computed(sequence, int(length))
            self.queue.charge(sequence.request.client, PROMPT_WEIGHT * int(length))
        done = [s if s.computed == len(s.request.prompt) else None for s in batch]
        self._landing.append((prefilled, batch, done))
        self._counters["prefill_steps"] += 1
        return True

    def _prefills(self, sequence: Sequence) -> bool:
        left = sequence.computed < len(sequence.request.prompt)
        return left and self.residents.can_compute(sequence)

    def _land(self, *, wait: bool) -> None:
        """Hands chunks that are done to decoding, in order; those to come too, to `wait`."""
        while self._landing and (wait or self.programs.arrived(self._landing[0][0])):
            prefilled, _, done = self._landing.popleft()
            logits = self.programs.land(prefilled)
            if any(done):
                self._insert(logits, logits.shape[0], done)

    def _insert(self, logits: Any, rows: int, sequences: list[Sequence | None]) -> None:
        """Gives prompts that are done, and sequences that resume, their rows of the batch."""
        vocab = self.programs.config.vocab_size
        output = self.programs.insert(logits, arrivals(sequences, rows, vocab, self.shapes))
        fresh = [(r, s) for r, s in enumerate(sequences) if s is not None and not s.new_tokens]
        for sequence in sequences:
            if sequence is not None:
                sequence.decoding = True
        for _, sequence in fresh:
            sequence.pending = 1
            self._counters["prompt_tokens"] += len(sequence.request.prompt)
            self._counters["cached_prompt_tokens"] += sequence.cached
        if fresh:
            self._results.send(output, fresh)

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
        output = self.programs.decode(self.params, self.residents.tables.copy(), active)
        self._results.send(output, batch)
        self._counters["decode_steps"] += 1
        self._counters["decode_rows"] += len(batch)
        return True

    def _goes_on(self, sequence: Sequence) -> bool:
        known = len(sequence.tokens) + sequence.pending
        return sequence.decoding and known < self.shapes.limit_of(sequence.request)

    def _cover(self, sequence: Sequence) -> None:
        """Sees that the next step's keys have a page, if need be by preempting the last in rank."""
        while True:
            known = len(sequence.tokens) + sequence.pending + self.shapes.guesses
            if self.residents.grow(sequence, known):
                return
            self._preempt(max(self.running, key=lambda each: each.rank))
            if sequence.slot is None or not self._goes_on(sequence):
                return

    # Ends -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Waits for all that was sent off."""
        self._land(wait=True)
        while self._results:
            self._results.read_oldest()

    def _charge_output(self, sequence: Sequence) -> None:
        self.queue.charge(sequence.request.client, OUTPUT_WEIGHT)

    def _finish(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        if sequence.slot is None:
            self.queue.remove(sequence)
        else:
            if any(sequence in batch for _, batch, _ in self._landing):
                self._land(wait=True)  # its pages go to others, who must not find it landing there
            self.residents.leave(sequence)
        sequence.done, sequence.saved = True, None
        self._finished[reason] += 1
        prompt = len(sequence.request.prompt)
        event = Finished(reason, prompt, sequence.new_tokens, sequence.cached, detail)
        sequence.listener(event)
