"""The compiler's own estimate of a program's time: cycles per fusion, times its executions.

XLA:TPU writes `"estimated_cycles"` beside most fusions, copies and convolutions, from its cost
model; collectives and Pallas kernels have none. What lies between the start and the end of an
asynchronous collective can hide it: its *cover*.

    costs = operations(module, frames)
    costs[0].name, costs[0].total_cycles
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tpu_stack.kernels.compiled import NO_ESTIMATE
from tpu_stack.planner.hlo_frames import Frames
from tpu_stack.planner.hlo_loops import Scope, Site, callee, trip_count
from tpu_stack.planner.hlo_text import Computation, Instruction, Module

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
CHAIN = re.compile(r'chain_id="(\w+)"')
_KERNEL = "tpu_custom_call"
_PASSED_ON = ("get-tuple-element", "tuple", "bitcast")


@dataclass(frozen=True)
class Operation:
    """One instruction at one place where the program runs it.

    `cycles` is the compiler's estimate for one execution, None for a Pallas kernel and for a
    product of types that its cost model does not know; `trips` is how often it runs, None when an
    enclosing loop's count is unknown.
    """

    name: str
    opcode: str
    op_name: str
    source: str
    cycles: int | None
    trips: int | None

    @property
    def total_cycles(self) -> int:
        """Cycles over the whole program; 0 where `cycles` or `trips` is unknown."""
        return (self.cycles or 0) * (self.trips or 0)


def operations(module: Module, frames: Frames) -> list[Operation]:
    """Instructions with an estimate, and those that lack one (see `Operation`), costliest first."""
    found = list(_walk(module, frames, Scope(module.entry), 1))
    return sorted(found, key=lambda item: -item.total_cycles)


def _walk(module: Module, frames: Frames, scope: Scope, trips: int | None) -> Iterator[Operation]:
    for instruction in scope.computation.instructions.values():
        cycles = estimate(instruction)
        if _CYCLES.search(instruction.attributes) or _KERNEL in instruction.attributes:
            source = frames.source(instruction.attributes)
            yield Operation(
                instruction.name, instruction.opcode, instruction.op_name,
                str(source) if source else "", cycles, trips,
            )  # fmt: skip
            continue
        site = Site(scope, instruction)
        for name, times in _inside(module, site):
            inner = None if trips is None or times is None else trips * times
            yield from _walk(module, frames, callee(site, name, module), inner)


def _inside(module: Module, site: Site) -> list[tuple[str, int | None]]:
    """The computations that an instruction without an estimate runs, and how often."""
    instruction = site.instruction
    names: list[tuple[str | None, int | None]] = []
    if instruction.opcode == "while":
        count = trip_count(module, site.scope, instruction)
        names = [(instruction.attribute("body"), count)]
    elif instruction.opcode in ("call", "async-start"):
        key = "calls" if instruction.opcode == "async-start" else "to_apply"
        names = [(instruction.attribute(key), 1)]
    elif instruction.opcode == "conditional":
        branches = instruction.attribute_list("branch_computations") or [
            instruction.attribute(key) or "" for key in ("true_computation", "false_computation")
        ]
        known = [name for name in branches if name in module.computations]
        costliest = max(known, key=lambda name: Costs(module).computation(name), default=None)
        names = [(costliest, 1)]
    return [(name, times) for name, times in names if name in module.computations]


def estimate(instruction: Instruction) -> int | None:
    """The compiler's cycles for one execution; None where it gives none."""
    match = _CYCLES.search(instruction.attributes)
    return int(match[1]) if match and int(match[1]) < NO_ESTIMATE else None


@dataclass(frozen=True)
class Costs:
    """Cycles of instructions and computations, with the executions of loops inside them."""

    module: Module

    @cached_property
    def _known(self) -> dict[str, int]:
        return {}

    def computation(self, name: str) -> int:
        """Cycles of one run of a computation."""
        if name not in self._known:
            scope = Scope(self.module.computations[name])
            self._known[name] = sum(
                self.instruction(scope, item) for item in scope.computation.instructions.values()
            )
        return self._known[name]

    def instruction(self, scope: Scope, instruction: Instruction) -> int:
        """Cycles of one run of an instruction; a loop with an unknown trip count runs once."""
        cycles = estimate(instruction)
        if cycles is not None:
            return cycles
        inside = _inside(self.module, Site(scope, instruction))
        return sum(self.computation(name) * (1 if n is None else n) for name, n in inside)

    def cover(self, scope: Scope, start: Instruction, chain: str | None = None) -> int | None:
        """Cycles of what is scheduled between a collective's start and its end.

        The end is the `-done` of `start`, or the last fusion of the `chain`. None when there is no
        end: nothing can hide the collective.
        """
        names = list(scope.computation.instructions)
        first = names.index(start.name)
        last = self._chain_end(scope, chain) if chain else _done(scope.computation, start)
        if last is None or names.index(last) <= first:
            return None
        between = names[first + 1 : names.index(last)]
        return sum(
            self.instruction(scope, scope.computation.instructions[name]) for name in between
        )

    def _chain_end(self, scope: Scope, chain: str) -> str | None:
        ends = [
            name
            for name, instruction in scope.computation.instructions.items()
            if instruction.opcode == "fusion"
            and chain in self._chains.get(instruction.attribute("calls") or "", ())
        ]
        return ends[-1] if ends else None

    @cached_property
    def _chains(self) -> dict[str, set[str]]:
        """Computation -> the chain_ids of its instructions."""
        return {
            name: {
                match[1]
                for instruction in computation.instructions.values()
                if (match := CHAIN.search(instruction.attributes))
            }
            for name, computation in self.module.computations.items()
        }


def _done(computation: Computation, start: Instruction) -> str | None:
    """The instruction that waits for `start`, found through updates and tuples."""
    pending, seen = [start.name], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for user in computation.users.get(name, []):
            if user.opcode.endswith("-done"):
                return user.name
            if user.opcode.endswith("-update") or user.opcode in _PASSED_ON:
                pending.append(user.name)
    return None
