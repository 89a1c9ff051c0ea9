"""Counts what a compiled program communicates: which collectives, how many bytes, over which axes.

Sharding rules say where tensors live; only the compiled program says what that costs. The text of
the program is walked from its entry through loops, calls and fusions, so a gather inside a scan of
32 layers counts 32 times. Programs of XLA:CPU (the emulated mesh) and of XLA:TPU (compiled ahead of
time) are read.

    compiled = jax.jit(step).lower(state, batch).compile()
    for row in summarize(collectives(compiled.as_text(), mesh)):
        print(row.kind, row.axes_label, row.count, row.bytes)

Bytes are the payload of one device in one execution, without padding:

| kind | payload |
|---|---|
| all-gather | its output |
| reduce-scatter | its input |
| all-reduce | the buffer (input and output are equal) |
| all-to-all, ragged-all-to-all | its output |
| collective-permute, collective-broadcast | its output |

Limits. XLA:CPU chooses its own collectives: `Collective.as_written` undoes its promotions and
unfused reduce-scatters where the text shows them (`hlo_source`), but XLA:TPU may still choose
others, and only XLA:TPU overlaps them. Groups over a part of a mesh axis are unmatched, with the
axis in `notes`. XLA may also shard weights over a mesh axis that no rule uses.
"""

import re
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from tpu_stack.planner.hlo_attribution import attribute
from tpu_stack.planner.hlo_collective import KINDS, Collective, CollectiveRow, summarize, wire_bytes
from tpu_stack.planner.hlo_cycles import CHAIN, Costs
from tpu_stack.planner.hlo_frames import Frames
from tpu_stack.planner.hlo_groups import span_of
from tpu_stack.planner.hlo_loops import Scope, Site, callee, trip_count
from tpu_stack.planner.hlo_source import as_written
from tpu_stack.planner.hlo_text import Array, Instruction, Module, arrays, elements, parse

if TYPE_CHECKING:  # so that a report can be read without importing JAX
    from jax.sharding import AbstractMesh, Mesh

__all__ = [
    "KINDS",
    "Collective",
    "CollectiveRow",
    "collectives",
    "collectives_of",
    "summarize",
    "wire_bytes",
]

_KIND = re.compile(rf"({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?$")
_CALLS = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}


def collectives(hlo_text: str, mesh: "Mesh | AbstractMesh") -> list[Collective]:
    """Every collective that the program runs, in program order, with its number of executions.

    `mesh` must be the one the program was compiled for: its axis order gives device positions
    their coordinates. Of a conditional's branches only the one that sends the most bytes counts.
    Raises ValueError when the text is no HLO module or was compiled for another number of devices.
    """
    module = parse(hlo_text)
    frames = Frames.of(hlo_text)
    return collectives_of(module, tuple(mesh.axis_sizes), tuple(mesh.axis_names), frames)


def collectives_of(
    module: Module, sizes: tuple[int, ...], names: tuple[str, ...], frames: Frames
) -> list[Collective]:
    """`collectives` of a parsed module, for a mesh with axes `names` of `sizes`.

    Raises ValueError when the module was compiled for another number of devices.
    """
    devices = module.partitions * module.replicas
    if devices != prod(sizes):
        raise ValueError(
            f"the program was compiled for {devices} devices, the mesh "
            f"{dict(zip(names, sizes, strict=True))} has {prod(sizes)}"
        )
    walk = _Walk(module, sizes, names, frames, Costs(module))
    walk.run(Scope(module.entry), _Context(trips=1))
    return walk.found


@dataclass(frozen=True)
class _Context:
    """What the enclosing instructions determine for everything inside them."""

    trips: int | None
    op_name: str = ""
    overlapped: bool = False
    notes: tuple[str, ...] = ()
    scatter_fusion: bool = False
    carrier: Site | None = None

    def times(self, count: int | None, loop: str) -> "_Context":
        if count is None:
            note = f"loop {loop}: trip count unknown"
            return replace(self, trips=None, notes=(*self.notes, note))
        return replace(self, trips=None if self.trips is None else self.trips * count)


@dataclass
class _Walk:
    module: Module
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    frames: Frames
    costs: Costs
    found: list[Collective] = field(default_factory=list)

    def run(self, scope: Scope, context: _Context, chains: set[str] | None = None) -> None:
        """Visits a computation. `chains` are the asynchronous chains already counted in the caller:
        XLA:TPU repeats a gather, under one chain_id, in each fusion that it overlaps with."""
        seen: set[str] = set()
        for instruction in scope.computation.instructions.values():
            site = Site(scope, instruction)
            match = _KIND.match(instruction.opcode)
            if match:
                chain = CHAIN.search(instruction.attributes)
                counted = seen if chains is None else chains
                if chain is None or chain[1] not in counted:
                    self._record(site, match[1], bool(match[2]), context)
                if chain is not None:
                    counted.add(chain[1])
            elif instruction.opcode == "while":
                self._loop(site, context)
            elif instruction.opcode == "conditional":
                self._branches(site, context)
            else:
                self._call(site, context, seen)

    def _loop(self, site: Site, context: _Context) -> None:
        count = trip_count(self.module, site.scope, site.instruction)
        name = site.instruction.op_name or context.op_name
        inside = replace(context, op_name=name, carrier=None)
        turns = {"condition": None if count is None else count + 1, "body": count}
        for key, times in turns.items():
            name = site.instruction.attribute(key)
            if name in self.module.computations:
                inner = inside.times(times, site.instruction.name)
                self.run(callee(site, name, self.module), inner)

    def _branches(self, site: Site, context: _Context) -> None:
        instruction = site.instruction
        names = instruction.attribute_list("branch_computations") or [
            name
            for key in ("true_computation", "false_computation")
            if (name := instruction.attribute(key))
        ]
        before, choices = self.found, []
        note = f"largest of {len(names)} branches of {instruction.name}"
        inside = replace(context, notes=(*context.notes, note))
        for position, name in enumerate(names):
            self.found = []
            inputs = site.operands[position + 1 : position + 2]
            self.run(Scope(self.module.computations[name], arguments=inputs), inside)
            choices.append(self.found)
        self.found = before + max(choices, key=_weight, default=[])

    def _call(self, site: Site, context: _Context, seen: set[str]) -> None:
        instruction = site.instruction
        key = _CALLS.get(instruction.opcode)
        names = [instruction.attribute(key)] if key else []
        if instruction.opcode in ("custom-call", "custom-call-start"):
            names = instruction.attribute_list("called_computations")
        asynchronous = instruction.opcode.endswith("-start")
        for name in names:
            if name in self.module.computations:
                inside = replace(
                    context,
                    op_name=instruction.op_name or context.op_name,
                    overlapped=context.overlapped or asynchronous,
                    scatter_fusion="AllReduceScatterFusion" in instruction.attributes
                    or name.startswith("all-reduce-scatter"),
                    carrier=site,
                )
                self.run(callee(site, name, self.module), inside, chains=seen)

    def _record(self, site: Site, kind: str, start: bool, context: _Context) -> None:
        instruction = site.instruction
        span = span_of(instruction.attributes, self.sizes, self.names)
        notes = context.notes
        if span.axes is None:
            notes = (*notes, f"groups of {span.group_size} within {'+'.join(span.within)}")
        if kind == "all-reduce" and context.scatter_fusion:
            kind = "reduce-scatter"
            buffers, notes = _outputs(instruction, start), (*notes, "fused all-reduce and slice")
        else:
            buffers = _payload(site, kind, start, span.group_size)
        written = as_written(self.module, site, kind, buffers, span.group_size)
        total = sum(buffer.bytes for buffer in buffers)
        dtype = "+".join(dict.fromkeys(buffer.dtype for buffer in buffers))
        source = {(part.kind, part.dtype) for part in written}
        if source != {(kind, buffer.dtype) for buffer in buffers}:
            label = ", ".join(sorted(f"{a} {b}" for a, b in source))
            notes = (*notes, f"written as {label}")
        chain = CHAIN.search(instruction.attributes)
        cover = self._cover(site, start, chain[1] if chain else None, context)
        op_name = instruction.op_name or context.op_name
        self.found.append(
            Collective(
                kind=kind,
                dtype=dtype,
                shapes=tuple(buffer.shape for buffer in buffers),
                bytes=total,
                trips=context.trips,
                axes=span.axes,
                group_size=span.group_size,
                op_name=op_name,
                overlapped=context.overlapped or start or chain is not None,
                as_written=written,
                notes=notes,
                purpose=attribute(self.module, site, kind, op_name, self.frames, span.group_size),
                cover_cycles=cover,
            )
        )

    def _cover(self, site: Site, start: bool, chain: str | None, context: _Context) -> int | None:
        """The compiler's cycles for what it scheduled between a collective's start and end."""
        carrier = context.carrier
        if start:
            return self.costs.cover(site.scope, site.instruction)
        if carrier is None or not (chain or carrier.instruction.opcode.endswith("-start")):
            return None
        return self.costs.cover(carrier.scope, carrier.instruction, chain)


def _weight(found: list[Collective]) -> float:
    return sum(item.wire_bytes * (item.trips or 1) for item in found)


def _outputs(instruction: Instruction, start: bool) -> tuple[Array, ...]:
    """The result arrays; a `-start` returns (inputs, outputs, context), except for all-reduce."""
    if not start or instruction.opcode == "all-reduce-start":
        return arrays(instruction.type)
    parts = elements(instruction.type)
    return arrays(parts[1] if len(parts) > 1 else parts[0])


def _payload(site: Site, kind: str, start: bool, group_size: int) -> tuple[Array, ...]:
    outputs = _outputs(site.instruction, start)
    if kind != "reduce-scatter":
        return outputs
    inputs = tuple(array for operand in site.operands for array in arrays(operand.instruction.type))
    return inputs or tuple(Array(a.dtype, (group_size, *a.shape)) for a in outputs)
