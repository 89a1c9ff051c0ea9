"""Whose a compiled buffer is: the axes of its shape, the mesh axes that split them, its layers.

A compiled program names operations, not tensors, and its shapes are one device's. Sizes are
matched to what the model and the batch make of them; where two axes have one size, both are named.

    owner(buffer, axis_names(request), layers=32)
    # 'all 32 layers; layers, batch (fsdp=64), tokens, d_model'
"""

import re
from dataclasses import dataclass

from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.hlo_frames import Frames
from tpu_stack.planner.memory.buffers import Buffer
from tpu_stack.planner.memory.prediction import axes_text
from tpu_stack.planner.tensors import shard_count
from tpu_stack.planner.workload import PrefillStep
from tpu_stack.serving.engine.build import PAGE
from tpu_stack.sharding.axes import BATCH, EMBED, FFW, HEADS, KV_HEADS, VOCAB

_DIMENSIONS = re.compile(r"\[([\d,]*)\]")


@dataclass(frozen=True)
class Held:
    """A compiled buffer and what it is: `what` operation or argument, `owner` its axes."""

    bytes: int
    shape: str
    what: str
    owner: str


def axis_names(request: CompileRequest) -> dict[int, str]:
    """Size on one device -> the names of the axes with that size and the mesh axes they lie on."""
    config, profile = request.config, request.profile
    axes: list[tuple[int, str, str | None]] = [
        (config.n_layers, "layers", None),
        (request.batch // request.accumulate, "batch", BATCH),
        *_tokens_and_pages(request),
        (config.d_model, "d_model", None),
        (config.d_model, "d_model", EMBED),
        (config.d_ff, "d_ff", FFW),
        (config.vocab_size, "vocabulary", VOCAB),
        (config.n_heads, "heads", HEADS),
        (config.n_kv_heads, "kv heads", KV_HEADS),
        (config.n_heads * config.head_dim, "heads x head_dim", HEADS),
        (config.head_dim, "head_dim", None),
    ]
    found: dict[int, list[str]] = {}
    for size, name, axis in axes:
        split = axes_text((axis,), profile) if axis else "unsplit"
        text = name if split == "unsplit" else f"{name} ({split})"
        if size > 1 and text not in found.setdefault(size // shard_count(profile, axis), []):
            found[size // shard_count(profile, axis)].append(text)
    return {size: " or ".join(names) for size, names in found.items()}


def _tokens_and_pages(request: CompileRequest) -> list[tuple[int, str, str | None]]:
    """What a train step counts in tokens, and the engine's programs in chunks and pages."""
    if request.program == "train":
        return [(request.seq_len, "tokens", None)]
    step = PrefillStep.of(request.prompt, request.batch // shard_count(request.profile, BATCH))
    pages, page = -(-request.context // PAGE["tpu"]), PAGE["tpu"]
    slots = request.batch // shard_count(request.profile, BATCH)
    return [
        (step.chunk, "tokens of a chunk", None),
        (step.rows * step.chunk, "tokens", None),
        (request.config.n_layers * slots * pages, "pages of all layers", None),
        (pages * page, "positions", None),
        (page, "tokens of a page", None),
    ]


def owner(buffer: Buffer, names: dict[int, str], layers: int) -> str:
    """The layers and axes that a buffer belongs to."""
    match = _DIMENSIONS.search(buffer.shape)
    sizes = [int(size) for size in match[1].split(",") if size] if match else []
    axes = ", ".join(names.get(size, str(size)) for size in sizes if size > 1)
    if sizes and sizes[0] == layers:
        return f"all {layers} layers; {axes}"
    return f"one layer; {axes}" if "while/body" in buffer.op_name else axes


def label(buffers: list[Buffer], request: CompileRequest, text: str) -> list[Held]:
    """The buffers with what and whose they are; `text`: of the program they are from."""
    names, frames = axis_names(request), Frames.of(text)
    found = []
    for buffer in buffers:
        source = frames.source(buffer.attributes)
        what = buffer.op_name.replace("\\", "") if buffer.argument is not None else ""
        operation = buffer.op_name.rpartition("/")[2] or buffer.instruction
        what = what or (f"{operation}, {source}" if source else operation)
        whose = owner(buffer, names, request.config.n_layers)
        found.append(Held(buffer.bytes, buffer.shape, what, whose))
    return found
