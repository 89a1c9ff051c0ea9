"""The buffers of a compiled program that are live together when it holds the most HBM.

The compiler gives totals; which tensors they are, it does not say. Its text is scheduled and every
array in it carries its layout, tiles included, so the live ranges can be followed here: what a
loop or an in-place operation shares is one buffer. Fragmentation of the compiler's heap is not in
the text, so the sum may fall short of its temporaries.

    held = most_held(parse(result.hlo_text()), header=result.hlo_text().split("\\n", 1)[0])
    sum(buffer.bytes for buffer in held), held[0].shape, held[0].op_name
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tpu_stack.planner.hlo_text import Computation, Instruction, Module, dtype_bits, elements
from tpu_stack.planner.memory.tiles import tiled_bytes

_TYPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILES = re.compile(r"T(\([\d,]+\))")
_SPACE = re.compile(r"S\((\d+)\)")
_SHARED = re.compile(r"\{(\d*)\}: \((\d+), \{")
_LISTS = re.compile(r'"indices":\[([^\]]*)\]')
_OUTPUTS = re.compile(r"\{(\d+)\}: \(\d+, \{")
_TRANSPARENT = {"bitcast", "optimization-barrier", "while", "add-dependency"}
_SOURCE = {"copy-start": 1}
"""Where the source stands in the tuple of an asynchronous start: first, but for copies. The result
is the other of the first two."""
HBM_SPACE = 0


@dataclass(frozen=True, eq=False)
class Buffer:
    """One array in HBM. `bytes` are as laid out, padding included; `argument` is its position
    among the program's arguments, None for what the program makes. `op_name` is JAX's name."""

    bytes: int
    shape: str
    instruction: str
    op_name: str
    attributes: str = ""
    argument: int | None = None


Value = Buffer | list["Value"]


def most_held(module: Module, header: str) -> list[Buffer]:
    """The arguments and the temporaries live together at the program's highest, largest first.

    `header` is the text's first line, which says what outputs reuse arguments.
    """
    entry = module.entry
    values = {
        i.name: _value_of(i.type, i, argument=number) for number, i in entry.parameters.items()
    }
    reused = {int(n) for n in _OUTPUTS.findall(header.partition("input_output_alias=")[2])}
    held = _Walk(module, entry, values, reused).highest
    own = [leaf for value in values.values() for leaf in leaves(value)]
    return sorted([*own, *held], key=lambda buffer: -buffer.bytes)


def leaves(value: Value) -> Iterator[Buffer]:
    """The buffers of a value, tuples flattened."""
    if isinstance(value, Buffer):
        yield value
    else:
        for part in value:
            yield from leaves(part)


def array_bytes(type_text: str) -> int:
    """Bytes in HBM of one array type as it is laid out; 0 for what lies in another memory."""
    match = _TYPE.search(type_text)
    if match is None or match[1] in ("token", "opaque"):
        return 0
    dtype, dims, order, rest = match[1], match[2], match[3], match[4] or ""
    space = _SPACE.search(rest)
    if space and int(space[1]) != HBM_SPACE:
        return 0
    shape = [int(size.lstrip("<=")) for size in dims.split(",") if size]
    minor_first = [int(axis) for axis in order.split(",") if axis] if order else []
    physical = [shape[axis] for axis in reversed(minor_first)] or shape
    tile = _TILES.search(rest)
    sizes = [int(size) for size in tile[1].strip("()").split(",")] if tile else []
    return tiled_bytes(physical, dtype_bits(dtype), sizes)


def _value_of(type_text: str, i: Instruction, argument: int | None = None) -> Value:
    """New buffers for a type, nested as the type is."""
    if type_text.lstrip().startswith("("):
        return [_value_of(part, i, argument) for part in elements(type_text)]
    shape = type_text.partition("{")[0].strip()
    return Buffer(array_bytes(type_text), shape, i.name, i.op_name, i.attributes, argument)


class _Walk:
    """Live ranges of one computation, given the values of its parameters."""

    def __init__(
        self,
        module: Module,
        computation: Computation,
        values: dict[str, Value],
        reused: set[int] | None = None,
    ):
        self.module, self.computation, self.values = module, computation, dict(values)
        self._outside = {id(leaf) for value in values.values() for leaf in leaves(value)}
        self._inner: dict[int, list[Buffer]] = {}
        self._born: dict[int, tuple[int, Buffer]] = {}
        self._last: dict[int, int] = {}
        for position, instruction in enumerate(computation.instructions.values()):
            if instruction.name not in self.values:
                self.values[instruction.name] = self._value(position, instruction)
        self._free_outputs(reused)

    def _free_outputs(self, reused: set[int] | None) -> None:
        """What is returned is written in place: into a loop's own state, or a donated argument."""
        root = self.values[self.computation.root]
        parts = root if isinstance(root, list) else [root]
        for number, part in enumerate(parts):
            for leaf in leaves(part):
                if reused is None or number in reused:
                    self._born.pop(id(leaf), None)
                elif id(leaf) in self._born:
                    self._last[id(leaf)] = len(self.computation.instructions)

    def _value(self, position: int, i: Instruction) -> Value:
        operands = [self.values[name] for name in i.operands if name in self.values]
        if i.opcode == "tuple":
            return operands
        if i.opcode == "get-tuple-element" and isinstance(operands[0], list):
            return operands[0][int(i.attribute("index") or 0)]
        for operand in operands:
            for leaf in leaves(operand):
                self._last[id(leaf)] = position
        if i.opcode in ("while", "conditional", "call"):
            self._inner[position] = self._nested(i, operands)
        if i.opcode in _TRANSPARENT:
            return operands[0]
        if i.opcode.endswith("-done") and operands:
            return _result(i, operands[0])
        value = _value_of(i.type, i)
        if i.opcode.endswith(("-start", "-update")) and operands:
            _put_source(i, operands, value)
        value = _shared(i, operands, value)
        for leaf in leaves(value):
            if id(leaf) not in self._outside and leaf.bytes:
                self._born.setdefault(id(leaf), (position, leaf))
        return value

    @cached_property
    def highest(self) -> list[Buffer]:
        """The buffers made here that are live together when they are the most bytes."""
        events: dict[int, list[tuple[int, Buffer]]] = {}
        for key, (start, leaf) in self._born.items():
            events.setdefault(start, []).append((1, leaf))
            events.setdefault(self._last.get(key, start) + 1, []).append((-1, leaf))
        live: dict[int, Buffer] = {}
        most, held, now = -1, [], 0
        for position in sorted({*events, *self._inner}):
            for sign, leaf in sorted(events.get(position, []), key=lambda event: event[0]):
                now += sign * leaf.bytes
                live.pop(id(leaf), None) if sign < 0 else live.update({id(leaf): leaf})
            inner = self._inner.get(position, [])
            total = now + sum(leaf.bytes for leaf in inner)
            if total > most:
                most, held = total, [*live.values(), *inner]
        return held

    def _nested(self, i: Instruction, operands: list[Value]) -> list[Buffer]:
        """What the costliest computation that `i` runs holds besides its operands."""
        branches = i.attribute_list("branch_computations")
        branches = branches or [i.attribute(f"{which}_computation") for which in ("true", "false")]
        runs = [(name, operands) for name in map(i.attribute, ("body", "to_apply"))]
        if i.opcode == "conditional":  # the operands after the first are one for each branch
            runs = [(name, [given]) for name, given in zip(branches, operands[1:], strict=False)]
        found: list[list[Buffer]] = [[]]
        for name, given in runs:
            computation = self.module.computations.get(name or "")
            if computation is None:
                continue
            values = {
                parameter.name: given[number]
                for number, parameter in computation.parameters.items()
                if number < len(given)
            }
            found.append(_Walk(self.module, computation, values).highest)
        return max(found, key=lambda held: sum(leaf.bytes for leaf in held))


def _result(i: Instruction, started: Value) -> Value:
    """What an asynchronous operation's end returns of what its start gave."""
    if not isinstance(started, list) or len(started) < 2:
        return started
    return started[1 - _SOURCE.get(i.opcode.replace("-done", "-start"), 0)]


def _put_source(i: Instruction, operands: list[Value], value: Value) -> None:
    """Puts the sources of an asynchronous operation in the place its tuple has for them."""
    if not isinstance(value, list) or len(value) < 2:
        return
    given = operands[1:] if i.opcode.endswith("-update") else operands
    place = _SOURCE.get(i.opcode, 0)
    if given:
        value[place] = given if isinstance(value[place], list) else given[0]


def _shared(i: Instruction, operands: list[Value], value: Value) -> Value:
    """The value with operands in the place of the outputs that are written over them."""
    for output, operand in _shared_pairs(i):
        if operand >= len(operands):
            continue
        if isinstance(value, Buffer):
            if isinstance(operands[operand], Buffer) and output == 0:
                return operands[operand]
        elif output < len(value):
            value[output] = operands[operand]
    return value


def _shared_pairs(i: Instruction) -> Iterator[tuple[int, int]]:
    """(output, operand) that are one buffer: by the operation itself, or as the compiler says."""
    if i.opcode in ("dynamic-update-slice", "scatter"):
        yield 0, 0
    _, _, stated = i.attributes.partition("output_to_operand_aliasing={")
    for output, operand in _SHARED.findall(stated.partition("})}")[0] + "})}" if stated else ""):
        yield int(output or 0), int(operand)
    _, _, lists = i.attributes.partition('"aliasing_operands":{"lists":[')
    for text in _LISTS.findall(lists.partition("]}]}")[0] + "]}]}" if lists else ""):
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        inputs = [number for number in numbers if number < len(i.operands)]
        for number in numbers:
            if inputs and number >= len(i.operands):
                yield number - len(i.operands), inputs[0]
