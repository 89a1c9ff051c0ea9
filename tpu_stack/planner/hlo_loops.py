"""Follows values through a program's text: how often a loop runs, and where an index comes from.

XLA:CPU prints `known_trip_count`; XLA:TPU does not, so the count is read from the loop itself: the
constant that its condition compares with, its first value and its step, each followed through
copies, fusions, tuples and values that outer loops carry unchanged.

    trip_count(module, Scope(module.entry), while_instruction)  # 3
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from tpu_stack.planner.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r"-?\d+$")
_UNCHANGED = frozenset(
    ["copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"]
)
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
_MAX_HOPS = 200


@dataclass(frozen=True, eq=False)
class Scope:
    """One use of a computation.

    For a fusion, call or branch, `arguments` are the values of the parameters, and `caller`, where
    known, is the instruction that runs it. For a loop's body or condition, `loop` is the while
    instruction.
    """

    computation: Computation
    arguments: tuple["Site", ...] = ()
    caller: "Site | None" = None
    loop: "Site | None" = None


class Site(NamedTuple):
    """An instruction in the scope it is used in."""

    scope: Scope
    instruction: Instruction

    @property
    def operands(self) -> tuple["Site", ...]:
        known = self.scope.computation.instructions
        names = self.instruction.operands
        return tuple(Site(self.scope, known[name]) for name in names if name in known)


def callee(site: Site, name: str, module: Module) -> Scope:
    """The scope of the computation `name` that `site` (fusion, call, while, conditional) runs."""
    if site.instruction.opcode == "while":
        return Scope(module.computations[name], loop=site)
    return Scope(module.computations[name], arguments=site.operands, caller=site)


def root_of(scope: Scope) -> Site:
    return Site(scope, scope.computation.instructions[scope.computation.root])


def origin(module: Module, site: Site) -> Site:
    """Follows a value back to the instruction that computed it: through copies, tuples, calls."""
    for _ in range(_MAX_HOPS):
        previous = step_back(module, site)
        if previous is None:
            return site
        site = previous
    return site


def readers(module: Module, site: Site) -> list[Site]:
    """The instructions that read a value, looking into and out of fusions."""
    scope, name = site.scope, site.instruction.name
    found: list[Site] = []
    for reader in scope.computation.users.get(name, []):
        here = Site(scope, reader)
        inner = _named(module, here, "calls") if reader.opcode == "fusion" else None
        if inner is None:
            found.append(here)
            continue
        for slot, operand in enumerate(reader.operands):
            parameter = inner.computation.parameters.get(slot)
            if operand == name and parameter is not None:
                found += readers(module, Site(inner, parameter))
    if name == scope.computation.root and scope.caller is not None:
        found += readers(module, scope.caller)
    return found


def depends_on(module: Module, sites: tuple[Site, ...], opcodes: frozenset[str]) -> bool:
    """Whether any of the values depends on an instruction with one of the opcodes."""
    pending, seen = list(sites), set()
    while pending:
        site = origin(module, pending.pop())
        key = (id(site.scope.computation), site.instruction.name)
        if key in seen:
            continue
        seen.add(key)
        if site.instruction.opcode in opcodes:
            return True
        pending += site.operands
    return False


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
    """How often a while's body runs, or None when the text does not determine it."""
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    site = Site(scope, loop)
    condition = _named(module, site, "condition")
    if condition is None:
        return None
    compare = origin(module, root_of(condition))
    if compare.instruction.opcode != "compare" or len(compare.operands) != 2:
        return None
    direction = compare.instruction.attribute("direction") or ""
    left, right = (origin(module, operand) for operand in compare.operands)
    if _constant(left) is not None:
        left, right, direction = right, left, _MIRRORED.get(direction, "")
    limit, index = _constant(right), _carried_index(left)
    if limit is None or index is None or left.scope is not condition:
        return None
    start = _element(module, site.operands[0], index)
    first = None if start is None else _constant(origin(module, start))
    step = _step(module, site, index)
    return None if first is None or not step else _iterations(direction, first, limit, step)


def _iterations(direction: str, first: int, limit: int, step: int) -> int | None:
    """Times that `for (i = first; i < limit; i += step)` runs; None when it would not end."""
    distance = limit - first
    if direction == "NE":
        return distance // step if distance * step >= 0 and distance % step == 0 else None
    if direction not in _MIRRORED or (direction[0] == "L") != (step > 0):
        return None
    if direction in ("LE", "GE"):
        distance += 1 if step > 0 else -1
    return max(0, -(-distance // step))


def _step(module: Module, loop: Site, index: int) -> int | None:
    """The constant that the body adds to element `index` of the loop's carry; None for no such."""
    body = _named(module, loop, "body")
    update = None if body is None else _element(module, root_of(body), index)
    if update is None:
        return None
    total = origin(module, update)
    if total.instruction.opcode not in ("add", "subtract") or len(total.operands) != 2:
        return None
    left, right = (origin(module, operand) for operand in total.operands)
    if total.instruction.opcode == "add" and _carried_index(right) == index:
        left, right = right, left
    step = _constant(right)
    if step is None or _carried_index(left) != index:
        return None
    return step if total.instruction.opcode == "add" else -step


def _named(module: Module, site: Site, key: str) -> Scope | None:
    name = site.instruction.attribute(key)
    return callee(site, name, module) if name in module.computations else None


def _constant(site: Site) -> int | None:
    if site.instruction.opcode != "constant" or not _INTEGER.match(site.instruction.arguments):
        return None
    return int(site.instruction.arguments)


def _tuple_index(instruction: Instruction) -> int:
    return int(instruction.attribute("index") or 0)


def _carried_index(site: Site) -> int | None:
    """k when the value is element k of a loop's carry, else None."""
    if site.instruction.opcode != "get-tuple-element" or site.scope.loop is None:
        return None
    if not site.operands or site.operands[0].instruction.opcode != "parameter":
        return None
    return _tuple_index(site.instruction)


def _element(module: Module, site: Site, index: int) -> Site | None:
    """Element `index` of a tuple value, when the tuple itself can be found."""
    source = origin(module, site)
    if source.instruction.opcode == "tuple" and index < len(source.operands):
        return source.operands[index]
    return None


def step_back(module: Module, site: Site) -> Site | None:
    """The site one step back that has the same value, or None."""
    instruction, scope = site.instruction, site.scope
    if instruction.opcode in _UNCHANGED and site.operands:
        return site.operands[0]
    if instruction.opcode == "parameter" and scope.arguments:
        position = int(instruction.arguments)
        return scope.arguments[position] if position < len(scope.arguments) else None
    if instruction.opcode in ("fusion", "call"):
        inner = _named(module, site, "calls" if instruction.opcode == "fusion" else "to_apply")
        return None if inner is None else root_of(inner)
    if instruction.opcode == "get-tuple-element" and site.operands:
        index = _carried_index(site)
        if index is None:
            return _taken_from(module, site.operands[0], _tuple_index(instruction))
        if scope.loop is not None and _unchanged_by(module, scope.loop, index):
            return _element(module, scope.loop.operands[0], index)
    return None


def _taken_from(module: Module, site: Site, index: int) -> Site | None:
    """Element `index` of a tuple, or of a loop's initial carry that the loop does not change."""
    source = origin(module, site)
    if source.instruction.opcode != "while" or not source.operands:
        return _element(module, site, index)
    return (
        _element(module, source.operands[0], index)
        if _unchanged_by(module, source, index)
        else None
    )


def _unchanged_by(module: Module, loop: Site, index: int) -> bool:
    """Whether a loop's body returns element `index` as it received it."""
    name = loop.instruction.attribute("body")
    if name not in module.computations:
        return False
    body = Scope(module.computations[name])
    update = _element(module, root_of(body), index)
    source = None if update is None else origin(module, update)
    return (
        source is not None
        and source.instruction.opcode == "get-tuple-element"
        and source.scope is body
        and bool(source.operands)
        and source.operands[0].instruction.opcode == "parameter"
        and _tuple_index(source.instruction) == index
    )
