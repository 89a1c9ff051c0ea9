"""Recovers a collective as it was before XLA:CPU rewrote it, where the text still shows it.

The emulated program is compiled for the CPU, whose rewrites would mislead a TPU plan: sums of
bfloat16 are promoted to float32, gathers of bfloat16 and int4 are widened, and a reduce-scatter
stays an all-reduce followed by a slice at the device's own offset. Each rule below looks for the
pattern that such a rewrite leaves; without it the collective is reported as compiled.

    as_written(module, Site(scope, instruction), "all-reduce", buffers, group_size=2)
"""

from typing import NamedTuple

from tpu_stack.planner.hlo_loops import Site, callee, depends_on, readers, root_of, step_back
from tpu_stack.planner.hlo_text import Array, Module, arrays, dtype_bits

_DEVICE_ID = frozenset({"partition-id", "replica-id"})
_PROMOTED = {"f32": "bf16", "s32": "s16", "u32": "u16"}
_LAYOUT = {
    *("bitcast", "copy", "reshape", "transpose", "broadcast"),
    *("dynamic-slice", "slice", "concatenate", "pad"),
}
_MAX_HOPS = 20


class Part(NamedTuple):
    """One buffer of a collective as the program asked for it; `bytes` per device."""

    kind: str
    dtype: str
    bytes: int


def as_written(
    module: Module, site: Site, kind: str, buffers: tuple[Array, ...], group_size: int
) -> tuple[Part, ...]:
    """For each payload buffer, the kind and dtype before XLA:CPU's rewrites."""
    instruction = site.instruction
    promoted = (instruction.attribute("to_apply") or "").endswith("_promoted")
    parts = []
    for position, buffer in enumerate(buffers):
        dtype = _PROMOTED.get(buffer.dtype, buffer.dtype) if promoted else buffer.dtype
        if not promoted and len(instruction.operands) == len(buffers):
            dtype = _narrow_source(module, site, position) or dtype
        scattered = kind == "all-reduce" and _is_scattered(
            module, site, position, buffer, group_size
        )
        written = "reduce-scatter" if scattered else kind
        parts.append(Part(written, dtype, Array(dtype, buffer.shape).bytes))
    return tuple(parts)


def _uses(module: Module, site: Site, position: int) -> list[Site]:
    """What reads output buffer `position`, seen through the tuple of a variadic collective."""
    if not site.instruction.type.startswith("("):
        return readers(module, site)
    elements = site.scope.computation.users.get(site.instruction.name, [])
    return [
        use
        for element in elements
        if element.opcode == "get-tuple-element"
        and int(element.attribute("index") or 0) == position
        for use in readers(module, Site(site.scope, element))
    ]


def _is_scattered(
    module: Module, site: Site, position: int, buffer: Array, group_size: int
) -> bool:
    """Whether every reader takes only this device's share, at an offset made from its id."""
    uses = _uses(module, site, position)
    return bool(uses) and all(_takes_share(module, use, buffer, group_size) for use in uses)


def _takes_share(
    module: Module, use: Site, buffer: Array, group_size: int, hops: int = _MAX_HOPS
) -> bool:
    instruction = use.instruction
    if instruction.opcode == "dynamic-slice":
        taken = sum(array.elements for array in arrays(instruction.type))
        share = taken * group_size == buffer.elements
        return share and depends_on(module, use.operands[1:], _DEVICE_ID)
    if instruction.opcode not in ("convert", "bitcast", "copy") or not hops:
        return False
    uses = readers(module, use)
    return bool(uses) and all(
        _takes_share(module, later, buffer, group_size, hops - 1) for later in uses
    )


def _narrow_source(module: Module, site: Site, position: int) -> str | None:
    """The narrower dtype when the operand is widened just before and narrowed just after."""
    narrow = _widened_from(module, site.operands[position]) if site.operands else None
    if narrow is None:
        return None
    uses = _uses(module, site, position)
    return narrow if any(_narrowed_to(module, use, narrow) for use in uses) else None


def _widened_from(module: Module, site: Site) -> str | None:
    for _ in range(_MAX_HOPS):
        instruction = site.instruction
        if instruction.opcode == "convert" and site.operands:
            before = arrays(site.operands[0].instruction.type)[0].dtype
            widened = dtype_bits(before) < dtype_bits(arrays(instruction.type)[0].dtype)
            return before if widened else None
        target = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        if target in module.computations:
            inner = callee(site, target, module)
            site = root_of(inner)
        elif instruction.opcode == "parameter" and site.scope.arguments:
            site = site.scope.arguments[int(instruction.arguments)]
        elif instruction.opcode in _LAYOUT and site.operands:
            site = site.operands[0]
        else:
            previous = step_back(module, site)
            if previous is None:
                return None
            site = previous
    return None


def _narrowed_to(module: Module, use: Site, dtype: str, hops: int = _MAX_HOPS) -> bool:
    if use.instruction.opcode == "convert":
        return arrays(use.instruction.type)[0].dtype == dtype
    if use.instruction.opcode not in _LAYOUT or not hops:
        return False
    return any(_narrowed_to(module, later, dtype, hops - 1) for later in readers(module, use))
