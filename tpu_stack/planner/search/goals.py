"""What a search can be after, and the plans that no other plan beats on both counts.

Example:
    GOALS["decode-latency"].front(plans)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tpu_stack.planner.search.candidate import Plan


@dataclass(frozen=True)
class Objective:
    """A figure of a plan. `value` is turned so that more is better; `shown` is as people read it.

    Attributes:
      name, unit: for axes and columns. rising: whether people want more of it.
    """

    name: str
    unit: str
    rising: bool
    shown: Callable[[Plan], float]

    def value(self, plan: Plan) -> float:
        """The figure, more being better."""
        return self.shown(plan) if self.rising else -self.shown(plan)

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name}, {self.unit}"


def _cost(plan: Plan) -> float:
    usd = plan.usd_per_million_tokens
    return float("inf") if usd is None else usd


THROUGHPUT = Objective("throughput", "tokens/s/chip", True, lambda p: p.tokens_per_s_per_chip)
TOTAL = Objective("speed", "tokens/s in all", True, lambda p: p.tokens_per_s)
LATENCY = Objective("latency", "ms", False, lambda p: 1e3 * p.step_s)
HEADROOM = Objective("memory headroom", "% of HBM", True, lambda p: 100 * p.headroom)
COST = Objective("cost", "USD per million tokens", False, _cost)


@dataclass(frozen=True)
class Goal:
    """What ranks the plans (`first`), and what is weighed against it (`second`).

    programs: what the goal can be asked of, its usual program first.
    """

    programs: tuple[str, ...]
    first: Objective
    second: Objective

    def rank(self, plans: Iterable[Plan]) -> list[Plan]:
        """Best first; of plans that are equal in both, the one with more bits a weight."""

        def key(plan: Plan) -> tuple[float, float, int]:
            return self.first.value(plan), self.second.value(plan), plan.candidate.weight_bits

        return sorted(plans, key=key, reverse=True)

    def front(self, plans: Iterable[Plan]) -> list[Plan]:
        """The Pareto front, best first: each next plan is worse by `first`, better by `second`."""
        found: list[Plan] = []
        for plan in self.rank(plans):
            if not found or self.second.value(plan) > self.second.value(found[-1]):
                found.append(plan)
        return found


GOALS = {
    "train-throughput": Goal(("train",), THROUGHPUT, HEADROOM),
    "prefill-throughput": Goal(("prefill",), THROUGHPUT, LATENCY),
    "decode-throughput": Goal(("decode",), THROUGHPUT, LATENCY),
    "decode-latency": Goal(("decode",), LATENCY, THROUGHPUT),
    "cost": Goal(("decode", "prefill", "train"), COST, LATENCY),
}
COST_OF_TRAINING = Goal(("train",), COST, TOTAL)
"""Of "cost" for a train step, whose time is no latency that anyone waits for."""


def goal_of(name: str, program: str) -> Goal:
    """The goal, as asked of one program."""
    return COST_OF_TRAINING if (name, program) == ("cost", "train") else GOALS[name]
