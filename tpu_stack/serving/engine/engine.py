"""The engine's loop: admit, prefill a chunk, decode a step, hand out tokens.

Continuous batching (Orca, Yu et al. 2022) over a paged cache. One step runs on the device while the
host reads the tokens of the one before. When blocks run out, the sequence of lowest priority is
preempted: its blocks are swapped out to the host, and it resumes exactly where it was. A sequence's
tokens do not depend on the others: every program has a fixed shape, and a row reads its own pages
only.

    engine = Engine(programs, params)
    engine.submit(ticket, listener)
    while engine.step(): ...
"""

import time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.batches import next_chunk, rows_to_insert, targets_of
from tpu_stack.serving.engine.block_manager import BlockManager
from tpu_stack.serving.engine.block_pool import BlockPool
from tpu_stack.serving.engine.programs import Prefilled, Programs
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


@dataclass(frozen=True)
class _Load:
    """Weights that wait to go live."""

    params: Any
    in_flight: InFlight
    live: Future[int]


class Engine:
    """Sequences, blocks and slots of one set of programs. Not thread-safe: one thread steps it."""

    def __init__(self, programs: Programs | TwoMeshes, params: Any):
        self.programs, self.params, self.shapes = programs, params, programs.shapes
        self.blocks = BlockManager(self.shapes)
        self.queue = WaitingQueue()
        self._prefilling: deque[tuple[Prefilled, list[Sequence], list[Sequence | None]]] = deque()
        self._next: _Load | None = None
        self._counters: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._seconds = {"step_s": 0.0, "host_s": 0.0}
        self._results = Results(self.shapes, self._counters, self._finish, self._charge_output)

    # What clients ask -------------------------------------------------------------------------

    def submit(self, ticket: Ticket, listener: Listener) -> Sequence:
        """Queues a request that `GenerationRequest.check` has passed."""
        prompt, score_from = ticket.request.prompt, ticket.request.score_from
        hashes = self.pool.block_hashes(prompt)
        if score_from is not None:  # the token before the first that is scored is computed
            hashes = hashes[: (score_from - 1) // self.shapes.page]
        sequence = Sequence(ticket, listener, list(prompt), hashes)
        self.queue.add(sequence)
        self._counters["submitted"] += 1
        return sequence

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled", detail: str = ""):
        """Ends a sequence wherever it is; nothing happens when it has ended."""
        if not sequence.done:
            self._finish(sequence, reason, detail)

    def load(self, params: Any, in_flight: InFlight, live: Future[int] | None = None) -> None:
        """Replaces the weights between two steps; `live` then gets their generation.

        Sequences in flight finish on the old ones, while new ones wait; or all start anew. A load
        that a later one overtakes is dropped, and its future raises UserError.
        """
        self.drop_load("other weights were loaded before these were live")
        self._next = _Load(params, in_flight, live or Future())

    def drop_load(self, why: str) -> None:
        """Forgets weights that are not live yet; their future raises UserError."""
        if self._next is not None:
            self._next.live.set_exception(UserError(f"the weights were not loaded: {why}"))
        self._next = None

    @property
    def pool(self) -> BlockPool:
        """The blocks of the key/value cache."""
        return self.blocks.pool

    @property
    def running(self) -> list[Sequence]:
        """Sequences in slots, prefilling or decoding."""
        return self.blocks.running

    def stats(self) -> Stats:
        """A snapshot, but for what the service counts."""
        return Stats(
            waiting=len(self.queue),
            running=len(self.running),
            slots=self.shapes.slots,
            pages=self.pool.total,
            pages_free=self.pool.free,
            pages_cached=self.pool.evictable,
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
        self._finish_prefills(wait=not worked and not any(s.decoding for s in self.running))
        worked |= self._decode()
        while len(self._results) > (1 if worked else 0):
            waited += self._results.pop()
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
        load, begun = self._next, self.running or self.queue.best(begun=True)
        if load.in_flight == "finish" and begun:
            return
        self.drain()
        for sequence in self.running:
            self.blocks.free(sequence)
            self._restart(sequence)
            self.queue.add(sequence, first=True)
        for sequence in self.queue:  # preempted ones hold what the old weights computed
            if sequence.swapped is not None:
                self._restart(sequence)
        self.pool.reset()
        self.params, self._next = load.params, None
        self._counters["generation"] += 1
        load.live.set_result(self._counters["generation"])

    def _restart(self, sequence: Sequence) -> None:
        sequence.swapped = None
        sequence.restart_prefill()
        if sequence.new_tokens or sequence.request.score_from is not None:
            sequence.tokens = list(sequence.request.prompt)
            sequence.listener(Restarted())

    # Admission --------------------------------------------------------------------------------

    def _admit(self) -> None:
        old_weights = self._next is not None  # only those that began with them go on
        while (best := self.queue.best(begun=old_weights)) is not None:
            if not self._make_room(best):
                return
            self.queue.remove(best)
            self.blocks.assign_slot(best)
            if best.swapped is not None:
                self.programs.swap_in(self.blocks.filled_blocks(best), best.swapped)
                best.swapped = None
                self._insert(None, 1, [best])

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether there is a slot, and blocks are allocated; lower priorities are preempted."""
        while not self.blocks.has_slot or not self.blocks.allocate(sequence):
            victim = max(self.running, key=lambda each: each.rank, default=None)
            if victim is None or victim.request.priority <= sequence.request.priority:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Swaps a sequence out of its slot to the host, and queues it again."""
        self.drain()
        if sequence.slot is None:
            return  # its last token was among those just read
        if sequence.decoding:
            sequence.swapped = self.programs.swap_out(self.blocks.filled_blocks(sequence))
        else:
            sequence.restart_prefill()
        self.blocks.free(sequence)
        self.queue.add(sequence, first=True)
        self._counters["preempted"] += 1

    # Prefill ----------------------------------------------------------------------------------

    def _prefill(self) -> bool:
        """One chunk of the first prompts in rank that can go on."""
        able = [s for s in sorted(self.running, key=lambda s: s.rank) if self._prefills(s)]
        if not able:
            return False
        batch, arrays = next_chunk(able, self.blocks.tables, self.shapes)
        if any(s.request.score_from is not None for s in batch):
            targets = targets_of(batch, arrays)
            prefilled = self.programs.score(self.params, *arrays, targets)
        else:
            prefilled = self.programs.prefill(self.params, *arrays)
        for row, (sequence, length) in enumerate(zip(batch, arrays.lengths, strict=False)):
            if sequence.request.score_from is not None:
                sequence.scores.append((prefilled.scores, row, int(length)))
            self.blocks.mark_computed(sequence, int(length))
            self.queue.charge(sequence.request.client, PROMPT_WEIGHT * int(length))
        done = [s if s.computed == len(s.request.prompt) else None for s in batch]
        self._prefilling.append((prefilled, batch, done))
        self._counters["prefill_steps"] += 1
        return True

    def _prefills(self, sequence: Sequence) -> bool:
        left = sequence.computed < len(sequence.request.prompt)
        return left and self.blocks.can_prefill(sequence)

    def _finish_prefills(self, *, wait: bool) -> None:
        """Hands chunks that are done to decoding, in order; those to come too, to `wait`."""
        while self._prefilling and (wait or self.programs.is_ready(self._prefilling[0][0])):
            prefilled, _, done = self._prefilling.popleft()
            logits = self.programs.finish_prefill(prefilled)
            for sequence in done:
                if sequence is not None:
                    self._counters["prompt_tokens"] += len(sequence.request.prompt)
                    self._counters["cached_prompt_tokens"] += sequence.cached
                    if sequence.scores and sequence.slot is not None:
                        self._results.push_scores(sequence)
            decode = [s if s is not None and s.request.max_tokens else None for s in done]
            if any(decode):
                self._insert(logits, logits.shape[0], decode)

    def _insert(self, logits: Any, rows: int, sequences: list[Sequence | None]) -> None:
        """Gives prompts that are done, and sequences that resume, their rows of the batch."""
        vocab = self.programs.config.vocab_size
        output = self.programs.insert(logits, rows_to_insert(sequences, rows, vocab, self.shapes))
        fresh = [(r, s) for r, s in enumerate(sequences) if s is not None and not s.new_tokens]
        for sequence in sequences:
            if sequence is not None:
                sequence.decoding = True
        for _, sequence in fresh:
            sequence.pending = 1
        if fresh:
            self._results.push(output, fresh)

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
        output = self.programs.decode(self.params, self.blocks.tables.copy(), active)
        self._results.push(output, batch)
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
            if self.blocks.grow(sequence, known):
                return
            self._preempt(max(self.running, key=lambda each: each.rank))
            if sequence.slot is None or not self._goes_on(sequence):
                return

    # Ends -------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Waits for every program that was dispatched, and hands out its tokens."""
        self._finish_prefills(wait=True)
        while self._results:
            self._results.pop()

    def _charge_output(self, sequence: Sequence) -> None:
        self.queue.charge(sequence.request.client, OUTPUT_WEIGHT)

    def _finish(self, sequence: Sequence, reason: FinishReason, detail: str = "") -> None:
        if sequence.slot is None:
            self.queue.remove(sequence)
        else:
            if any(sequence in batch for _, batch, _ in self._prefilling):
                self._finish_prefills(wait=True)  # before its blocks become another's
            self.blocks.free(sequence)
        sequence.done, sequence.swapped = True, None
        self._finished[reason] += 1
        prompt = len(sequence.request.prompt)
        event = Finished(reason, prompt, sequence.new_tokens, sequence.cached, detail)
        sequence.listener(event)
