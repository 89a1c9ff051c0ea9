"""Reads the text of a compiled XLA program into computations and instructions.

The planner learns from the compiler's own output what a program moves. `compiled.as_text()` is the
only form that both XLA:CPU and XLA:TPU give, so it is parsed here, and the other planner modules
work on the parsed `Module`.

    module = parse(jax.jit(f).lower(x).compile().as_text())
    [i.opcode for i in module.entry.instructions.values()]
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BITS = re.compile(r"(?:bf|[sufc])(\d+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_NAME = re.compile(r"%?([\w.\-]+)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


class Array(NamedTuple):
    """One array type: XLA's dtype name (`bf16`, `f32`, `s4`, `pred`) and its dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without padding; types under 8 bits count as packed, as XLA:TPU stores them."""
        return (self.elements * dtype_bits(self.dtype) + 7) // 8


def dtype_bits(dtype: str) -> int:
    """Bits per element of an XLA dtype name; 0 for `token` and `opaque`."""
    if dtype == "pred":
        return 8
    match = _BITS.match(dtype)
    return int(match[1]) if match else 0


def arrays(type_text: str) -> tuple[Array, ...]:
    """All array types inside an HLO type, tuples flattened; a bounded size counts at its bound."""
    return tuple(
        Array(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _ARRAY.findall(_COMMENT.sub("", type_text))
        if dtype not in ("token", "opaque")
    )


def split_top(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for position, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


def elements(type_text: str) -> list[str]:
    """The elements of a tuple type, each as type text; the type itself when it is no tuple."""
    text = _COMMENT.sub("", type_text).strip()
    return split_top(text[1:-1]) if text.startswith("(") else [text]


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. `operands` are names of instructions; `arguments` is the text between the
    brackets, such as a constant's literal or a parameter's number."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def attribute(self, key: str) -> str | None:
        """The name or word after `key=`, or None."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def attribute_list(self, key: str) -> list[str]:
        """The names inside `key={%a, %b}`; empty when the key is absent."""
        match = re.search(rf"\b{key}=\{{([^}}]*)\}}", self.attributes)
        return [name.strip().lstrip("%") for name in match[1].split(",")] if match else []

    @property
    def op_name(self) -> str:
        """The JAX name stack in the metadata, or the empty string."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in program order. `root` names the one whose value is returned."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each value, the instructions that read it."""
        readers: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                readers.setdefault(operand, []).append(instruction)
        return readers

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by their position."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclass(frozen=True)
class Module:
    """A whole program. `partitions` is the number of devices one SPMD program runs on."""

    name: str
    computations: dict[str, Computation]
    entry: Computation
    partitions: int
    replicas: int


def parse(text: str) -> Module:
    """Parses the text of one HLO module, of XLA:CPU or XLA:TPU, scheduled or not.

    Raises ValueError when the text has no complete ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    body: dict[str, Instruction] | None = None
    for line in _whole_lines(text):
        if body is None:
            header = _HEADER.match(line)
            if header:
                name, root, body = header[2], "", {}
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body, root)
            body = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                body[instruction.name] = instruction
                root = instruction.name if line.lstrip().startswith("ROOT ") or not root else root
    if entry not in computations:
        raise ValueError("the HLO text has no complete ENTRY computation")
    first = text.lstrip().split("\n", 1)[0]
    return Module(
        name=first.split(",")[0].removeprefix("HloModule ").strip(),
        computations=computations,
        entry=computations[entry],
        partitions=_header_number(first, "num_partitions"),
        replicas=_header_number(first, "replica_count"),
    )


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of the text, each joined with those that continue its braces.

    A Pallas kernel's `kernel_metadata={...}` is printed over several lines, and repeated on what
    reads its result.
    """
    whole, depth = "", 0
    for line in text.splitlines():
        if not depth and not line.startswith(" "):  # the header of a computation, or its end
            yield line
            continue
        whole += line
        depth += line.count("{") - line.count("}")
        if depth and '"' in line:
            bare = _QUOTED.sub("", whole)
            depth = bare.count("{") - bare.count("}")
        if not depth:
            yield whole
            whole = ""


def _header_number(first_line: str, key: str) -> int:
    match = re.search(rf"\b{key}=(\d+)", first_line)
    return int(match[1]) if match else 1


def _parse_instruction(line: str) -> Instruction | None:
    left, separator, right = line.strip().partition(" = ")
    if not separator:
        return None
    type_end = _closing(right, 0) if right.startswith("(") else right.find(" ")
    opcode = _OPCODE.match(right, max(type_end, 0))
    if type_end < 0 or opcode is None:
        return None
    end = _closing(right, opcode.end() - 1)
    arguments = _COMMENT.sub("", right[opcode.end() : end - 1])
    names = ()
    if opcode[1] not in ("constant", "parameter", "iota"):
        found = (_NAME.search(part) for part in split_top(arguments))
        names = tuple(match[1] for match in found if match)
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode[1],
        type=right[:type_end],
        operands=names,
        arguments=arguments.strip(),
        attributes=right[end:],
    )


def _closing(text: str, start: int) -> int:
    """Index just past the bracket that closes the one at `start`; -1 when none does."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return -1
