"""The plans that are shown, checked with `planner.memory`: too slow for all, exact enough for them.

Example:
    plans = settle(question, plans, show=8, too_large=print)
"""

import dataclasses
from collections.abc import Callable

from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.memory.predict import predict
from tpu_stack.planner.search.ask import Question
from tpu_stack.planner.search.candidate import Candidate, Plan


def request_of(config: ModelConfig, candidate: Candidate) -> CompileRequest:
    """The candidate's program, as `planner.aot` and `planner.memory` take it."""
    profile, batch = candidate.profile, candidate.batch
    if candidate.program == "train":
        split = candidate.accumulate
        return CompileRequest(config, profile, "train", batch, candidate.length, split)
    return CompileRequest(
        config, profile, candidate.program, batch, context=candidate.length,
        prompt=candidate.tokens // batch, format=candidate.format,
    )  # fmt: skip


def checked(config: ModelConfig, plan: Plan) -> Plan:
    """The plan with the memory that `planner.memory` predicts; without remat, where that falls
    short of what was compiled, with the larger of it and the quick count."""
    terms: dict[str, float] = dict(predict(request_of(config, plan.candidate)).held)
    if plan.candidate.profile.remat == "none" and plan.candidate.program == "train":
        terms = max(dict(plan.memory), terms, key=lambda held: sum(held.values()))
    return dataclasses.replace(plan, memory=terms, checked=True)


def one_of_each(plans: list[Plan]) -> list[Plan]:
    """The first of every slice, mesh and format or remat: batches differ by little."""
    found: dict[tuple[str, ...], Plan] = {}
    for plan in plans:
        profile = plan.candidate.profile
        key = (profile.name, plan.candidate.mesh, profile.remat, plan.candidate.format)
        found.setdefault(key, plan)
    return list(found.values())


def settle(
    question: Question, plans: list[Plan], show: int, too_large: Callable[[Plan], None]
) -> list[Plan]:
    """The plans, best first, of which the whole front and the `show` best of `one_of_each` are
    checked; those that turn out not to fit are left out, and told to `too_large`."""
    goal = question.goal
    while True:
        plans = goal.rank(plans)
        shown = {id(plan) for plan in goal.front(plans) + one_of_each(plans)[:show]}
        if all(plan.checked for plan in plans if id(plan) in shown):
            return plans
        kept = []
        for plan in plans:
            if id(plan) in shown and not plan.checked:
                plan = checked(question.config, plan)
                if plan.headroom < 0:
                    too_large(plan)
                    continue
            kept.append(plan)
        plans = kept
