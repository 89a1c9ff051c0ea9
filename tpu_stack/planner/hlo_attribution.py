"""Attributes a collective: to the tensor it gathers, the gradient it sums, or its source line.

The text names the arguments of the program (`state.params['blocks']['mlp']['w_up']`), so a gathered
value is followed back to one of them. A summed gradient is attributed to the parameters of its
shape. Any other collective is named by its primitive and the source line in its metadata.

Example:
    attribute(module, Site(scope, instruction), "all-gather", op_name, frames, group_size=64)
"""

import re
from functools import lru_cache

from tpu_stack.planner.hlo_frames import Frames, Source
from tpu_stack.planner.hlo_loops import Site, origin
from tpu_stack.planner.hlo_text import Module, arrays

_KEY = re.compile(r"\[\\?'([^'\\]+)\\?'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")
_CARRIED_ON = {
    "dynamic-slice": 0, "slice": 0, "transpose": 0, "pad": 0, "broadcast": 0,
    "dynamic-update-slice": 1, "concatenate": 0, "select": 1, "optimization-barrier": 0,
    "collective-permute": 0, "bitcast-convert": 0,
    "slice-start": 0, "slice-done": 0,
}  # fmt: skip
"""Opcode -> the operand whose value it passes on, whole or in part, without arithmetic."""
_PREFETCHED = 'custom_call_target="ConcatBitcast"'
"""The custom call by which XLA:TPU joins slices of stacked layers that it prefetched into VMEM."""
_MAX_HOPS = 40
STACKED = "blocks."
"""Prefix of the parameters whose first dimension is the layers that a scan walks over."""
_PARAMETERS = re.compile(r"^(?:state\.)?params(?=[\[.])")


def attribute(
    module: Module, site: Site, kind: str, op_name: str, frames: Frames, group_size: int
) -> str:
    """What a collective is for, in one phrase; its direction (forward, backward ...) comes last."""
    source = frames.source(site.instruction.attributes)
    what = _what(module, site, kind, op_name, group_size, source)
    if not what:
        primitive = op_name.rpartition("/")[2] or site.instruction.opcode
        verb = {"all-reduce": "sum", "reduce-scatter": "sum", "all-gather": "gather"}.get(kind)
        what = f"{verb or 'move'} of {primitive}" + (f" in {source}" if source else "")
    direction = _direction(op_name)
    return f"{what}, {direction}" if direction else what


def _what(
    module: Module, site: Site, kind: str, op_name: str, group_size: int, source: Source | None
) -> str:
    tensors = [
        name for operand in site.operands if (name := argument_of(module, operand)) is not None
    ]
    if tensors:
        verb = {"all-gather": "gather", "all-reduce": "gather by sum"}.get(kind, "move")
        return f"{verb} of {' + '.join(dict.fromkeys(tensors))}"
    if kind in ("all-reduce", "reduce-scatter") and "transpose(" in op_name:
        names = gradients_of(module, site, group_size, source.line() if source else "")
        if names:
            return f"gradient of {names}"
    return ""


def argument_of(module: Module, site: Site) -> str | None:
    """The argument of the program that a value is (a part of), or None when it is computed."""
    for _ in range(_MAX_HOPS):
        site = origin(module, site)
        instruction = site.instruction
        if instruction.opcode == "parameter":
            return argument_name(instruction.op_name)
        slot = _CARRIED_ON.get(instruction.opcode)
        if _PREFETCHED in instruction.attributes:
            slot = 0
        if slot is None or slot >= len(site.operands):
            return None
        site = site.operands[slot]
    return None


def argument_name(op_name: str) -> str | None:
    """`state.params['blocks']['mlp']['w_up']` as `blocks.mlp.w_up`; None for no name."""
    op_name = _PARAMETERS.sub("", op_name)
    head = re.match(r"[A-Za-z_]\w*", op_name)
    keys = [next(filter(None, match)) for match in _KEY.findall(op_name)]
    names = ([head[0]] if head else []) + keys
    return ".".join(names) or None


def gradients_of(module: Module, site: Site, group_size: int, line: str = "") -> str:
    """The parameters whose gradient the collective's buffers can be, by shape; "" for none.

    A gradient has the shape of the device's shard of the parameter, without the dimension of layers
    that a scan walks over, or with one dimension `group_size` times larger. Where several
    parameters fit a single buffer, those that the source `line` names are kept.
    """
    names = []
    buffers = [array for operand in site.operands for array in arrays(operand.instruction.type)]
    for buffer in buffers:
        fitting = _parameters_by_shape(module, group_size).get(_squeezed(buffer.shape), [])
        if len(buffers) == 1:
            named = [name for name in fitting if name.rpartition(".")[2] in line]
            fitting = named or fitting
        if not fitting:
            return ""
        names.append(" or ".join(fitting))
    return " + ".join(dict.fromkeys(names))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


@lru_cache(maxsize=8)
def _by_shape(
    arguments: tuple[tuple[str, tuple[int, ...]], ...], group_size: int
) -> dict[tuple[int, ...], list[str]]:
    found: dict[tuple[int, ...], list[str]] = {}
    for name, shape in arguments:
        for local in [shape, shape[1:]] if name.startswith(STACKED) else [shape]:
            forms = [local] + [
                (*local[:dim], local[dim] * group_size, *local[dim + 1 :])
                for dim in range(len(local))
            ]
            for form in forms:
                names = found.setdefault(_squeezed(form), [])
                if name not in names:
                    names.append(name)
    return found


def _parameters_by_shape(module: Module, group_size: int) -> dict[tuple[int, ...], list[str]]:
    arguments = [
        (argument_name(item.op_name) or item.op_name, arrays(item.type)[0].shape)
        for item in module.entry.parameters.values()
        if item.op_name.startswith("state.params")
    ]
    return _by_shape(tuple(arguments), group_size)


def _direction(op_name: str) -> str:
    if "rematted_computation" in op_name:
        return "recomputed for backward"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else ""
