"""The TPU compiler's word on the best plans: rung 3 beside rung 4.

Example:
    confirm(found.best[:3], "llama3_8b")[0].verdict  # 'fits'
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.answer import compile_spec
from tpu_stack.planner.aot.result import (
    OUTCOMES,
    Compiled,
    CompilerMissing,
    OutOfMemory,
    Result,
    TimedOut,
)
from tpu_stack.planner.aot.spec import TIMEOUT_S
from tpu_stack.planner.search.candidate import Plan


@dataclass(frozen=True)
class Confirmation:
    """A plan, and what came of compiling it: a result of `planner.aot`, or why none was asked."""

    plan: Plan
    result: Result | UserError

    @property
    def used_bytes(self) -> int | None:
        """What a device must have, by the compiler; None where it does not say."""
        if isinstance(self.result, Compiled):
            return self.result.memory.total_bytes
        return self.result.used_bytes if isinstance(self.result, OutOfMemory) else None

    @property
    def fits(self) -> bool | None:
        """Whether the program fits the chip that was asked for; None where that is not known."""
        if isinstance(self.result, Compiled):
            return self.result.memory.total_bytes <= self.plan.capacity
        return False if isinstance(self.result, OutOfMemory) else None

    @property
    def verdict(self) -> str:
        """A few words for a table: "fits", "out of memory", "not available", or the outcome."""
        if isinstance(self.result, UserError | CompilerMissing):
            return "not available"
        word = OUTCOMES[type(self.result)]
        if self.fits is not None:
            word = "fits" if self.fits else "out of memory"
        target = self.result.target
        return f"{word} (by the proxy {target.chip})" if target.is_proxy else word

    @property
    def reason(self) -> str:
        """Why there is no program; "" where there is one."""
        result = self.result
        if isinstance(result, Compiled):
            return ""
        if isinstance(result, TimedOut):
            return f"it took more than {result.limit_s:g} s"
        return str(result) if isinstance(result, UserError) else result.message

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        refused = isinstance(self.result, UserError)
        return {
            "plan": self.plan.as_json(),
            "outcome": "not available" if refused else OUTCOMES[type(self.result)],
            "fits": self.fits,
            "compiler_bytes_per_device": self.used_bytes,
            "predicted_bytes_per_device": self.plan.held_bytes,
            "verdict": self.verdict,
            "reason": self.reason,
        }


def confirm(
    plans: Sequence[Plan],
    model: str,
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    stage: Callable[[Plan, str], None] = lambda plan, name: None,
) -> list[Confirmation]:
    """Compiles every plan's program, or finds it in the cache; `stage` is told as it goes.

    Raises UserError for a time limit that is not positive.
    """
    if not timeout_s > 0:
        raise UserError(f"--timeout is {timeout_s:g}; it must be more than 0 seconds")
    found = []
    for plan in plans:
        try:
            result = compile_spec(
                plan.candidate.spec(model),
                cache=cache,
                timeout_s=timeout_s,
                stage=lambda name, plan=plan: stage(plan, name),
            )
        except UserError as error:  # such as a slice that the compiler's proxy cannot have
            result = error
        found.append(Confirmation(plan, result))
    return found
