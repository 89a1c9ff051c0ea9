"""The search itself: every legal candidate, those that fit simulated, the best of them found.

Example:
    found = search(Ask("llama3_8b", ("v6e:64",), "decode-throughput", latency_s=0.02))
    found.best[0].candidate.text, found.rate
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.planner.memory.predict import limit_of
from tpu_stack.planner.memory.serve import ServeMemory
from tpu_stack.planner.search.ask import Ask, Question
from tpu_stack.planner.search.candidate import Candidate, Plan
from tpu_stack.planner.search.check import one_of_each, settle
from tpu_stack.planner.search.memory import (
    Bytes,
    TrainMemory,
    state_bytes_per_element,
)
from tpu_stack.planner.search.score import Scorer, notes
from tpu_stack.planner.search.space import batches, legal_meshes, meshes, training_choices
from tpu_stack.planner.tensors import shard_count
from tpu_stack.serving.layout import with_groups
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import Profile
from tpu_stack.units import bytes_text, seconds_text

RUNG = "projected (rung 4): the calibrated simulator"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
      plans: all that fit and are quick enough, best first. front: the Pareto front of them.
      meshes, legal: (slice, format) pairs of a mesh looked at, and those that divide the model.
      candidates, fitting: looked at, and of them simulated, because they fit. seconds: what all
        this took, once the model's tensors were known.
      notes: what to know before trusting it: extrapolation, missing prices.
    """

    question: Question
    plans: list[Plan]
    front: list[Plan]
    meshes: int
    legal: int
    candidates: int
    fitting: int
    seconds: float
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> list[Plan]:
        """The best plan of every slice, mesh and format or remat."""
        return one_of_each(self.plans)

    @property
    def rate(self) -> float:
        """Candidates a second."""
        return self.candidates / self.seconds

    def as_json(self, top: int) -> dict[str, Any]:
        """JSON-ready: the counts, the best `top` and the whole front."""
        ask, goal = self.question.ask, self.question.goal
        return {
            "model": ask.model,
            "chips": list(ask.chips),
            "goal": ask.goal,
            "program": self.question.program,
            "rung": RUNG,
            "objectives": [goal.first.label, goal.second.label],
            "meshes": self.meshes,
            "legal_meshes": self.legal,
            "candidates": self.candidates,
            "fitting": self.fitting,
            "seconds": self.seconds,
            "candidates_per_s": self.rate,
            "notes": list(self.notes),
            "best": [plan.as_json() for plan in self.best[:top]],
            "pareto_front": [plan.as_json() for plan in self.front],
        }


class _Tally:
    """Counts, and the candidates that come nearest to being possible."""

    def __init__(self):
        self.meshes = self.legal = self.candidates = 0
        self.plans: list[Plan] = []
        self.smallest: tuple[Candidate, Bytes, int] | None = None
        self.shard_counts: set[int] = set()
        self.refusals: list[str] = []

    def not_after_all(self, plan: Plan) -> None:
        """Notes a plan whose checked memory does not fit."""
        self.too_large(plan.candidate, plan.memory, plan.capacity)

    def too_large(self, candidate: Candidate, memory: Bytes, capacity: int) -> None:
        """Notes a candidate that does not fit."""
        if self.smallest is not None:
            _, least, has = self.smallest
            if sum(memory.values()) / capacity >= sum(least.values()) / has:
                return
        self.smallest = (candidate, memory, capacity)

    def nothing_fits(self) -> str:
        """What to say where nothing does."""
        assert self.smallest is not None
        candidate, memory, capacity = self.smallest
        term = max(memory, key=lambda name: memory[name])
        return (
            f"nothing fits; the nearest, {candidate.text}, needs"
            f" {bytes_text(sum(memory.values()))} of {bytes_text(capacity)} a device,"
            f" {bytes_text(memory[term])} of it for {term}"
        )


def search(
    ask: Ask, done: Callable[[int, int], None] = lambda done, of: None, show: int = 8
) -> Found:
    """Tries everything legal.

    Args:
      show: how many of `Found.best` are checked with `planner.memory`; the front always is.
      done: told how many of how many (slice, format) pairs are through.

    Raises: UserError for a bad question, and, with what comes nearest, where no mesh is legal, no
      batch divides, nothing fits, or nothing is quick enough.
    """
    question = ask.read()
    pairs = [(p, format) for p in question.profiles for format in question.formats(p)]
    state_bytes_per_element(question.config)  # reads the model, once
    tally, start = _Tally(), time.perf_counter()
    for number, (profile, format) in enumerate(pairs):
        done(number, len(pairs))
        _try_slice(question, profile, format, tally)
    seconds = time.perf_counter() - start
    done(len(pairs), len(pairs))
    fitting = len(tally.plans)
    plans = settle(question, _quick_enough(question, tally), show, tally.not_after_all)
    if not plans:
        raise UserError(tally.nothing_fits())
    return Found(
        question,
        plans,
        question.goal.front(plans),
        tally.meshes,
        tally.legal,
        tally.candidates,
        fitting,
        seconds,
        notes(question),
    )


def _try_slice(question: Question, profile: Profile, format: str, tally: _Tally) -> None:
    """Everything on one slice, in one format."""
    config = question.config
    specs = with_groups(config, format) if format else tensor_specs(config)
    tally.meshes += len(meshes(profile))
    for placed in legal_meshes(profile, specs):
        try:
            tried = _candidates(question, placed, format)
        except UserError as error:  # groups of scales that the model does not fill
            tally.refusals.append(str(error))
            continue
        tally.legal += 1
        tally.shard_counts.add(shard_count(placed, BATCH))
        scorer = Scorer.of(config, placed, question.ask.flash)
        capacity = limit_of(placed)
        for candidate, memory in tried:
            tally.candidates += 1
            if sum(memory.values()) > capacity:
                tally.too_large(candidate, memory, capacity)
            else:
                terms = scorer.terms(candidate)
                serving = candidate.program != "train"
                tally.plans.append(Plan(candidate, terms, memory, capacity, checked=serving))


def _candidates(
    question: Question, profile: Profile, format: str
) -> Iterator[tuple[Candidate, Bytes]]:
    """Every candidate on one mesh, and what it holds. Raises UserError where the format is cut."""
    if question.program == "train":
        return _train_candidates(question, profile)
    return _serve_candidates(question, profile, ServeMemory(question.config, profile, format))


def _train_candidates(question: Question, profile: Profile) -> Iterator[tuple[Candidate, Bytes]]:
    length = question.length
    memory = TrainMemory(question.config, profile, length)
    for batch in batches(question, profile):
        for chosen, parts in training_choices(profile, batch):
            held = memory.held(chosen, batch=batch, accumulate=parts)
            tokens = batch * length
            yield Candidate("train", chosen, batch, tokens, length, accumulate=parts), held


def _serve_candidates(
    question: Question, profile: Profile, memory: ServeMemory
) -> Iterator[tuple[Candidate, Bytes]]:
    per_row, length = question.tokens_per_row, question.length
    program, prompt = question.program, question.work.prompt
    for batch in batches(question, profile):
        held = memory.predict(program, batch=batch, context=length, prompt=prompt).held
        tokens = batch * per_row
        yield Candidate(program, profile, batch, tokens, length, format=memory.format), held


def _quick_enough(question: Question, tally: _Tally) -> list[Plan]:
    """The plans within the latency. Raises UserError with what comes nearest where none is."""
    if not tally.legal:
        raise UserError(f"no mesh is legal: {tally.refusals[0]}")
    if not tally.candidates:
        raise UserError(_nearest_batch(question.ask.batches, tally.shard_counts))
    if not tally.plans:
        raise UserError(tally.nothing_fits())
    limit = question.ask.latency_s
    quick = [plan for plan in tally.plans if limit is None or plan.step_s <= limit]
    if limit is not None and not quick:
        nearest = min(tally.plans, key=lambda plan: plan.step_s)
        raise UserError(
            f"nothing that fits takes at most {seconds_text(limit)} a step; the nearest,"
            f" {nearest.candidate.text}, takes {seconds_text(nearest.step_s)} (projected)"
        )
    return quick


def _nearest_batch(given: tuple[int, ...], splits: set[int]) -> str:
    """Why no batch is possible, and the nearest that would be."""
    near = [max(1, round(batch / split)) * split for batch in given for split in splits]
    best = min(near, key=lambda size: min(abs(size - batch) for batch in given))
    asked = ", ".join(map(str, given))
    return f"--batch {asked}: no legal mesh splits it evenly; the nearest that works is {best}"
