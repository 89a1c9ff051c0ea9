"""The nearest changes to a program that does not fit, each checked before it is offered.

Example:
    for change in changes(request):
        print(change.text, change.verdict.prediction.total_bytes)
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.memory.predict import Verdict
from tpu_stack.planner.tensors import shard_count
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.mesh import mesh_text
from tpu_stack.sharding.profiles import MESH_AXES

LIGHTER_REMAT = {"none": ("dots", "full"), "dots": ("full",), "full": ()}
SERVE_FORMATS = ("int8", "int4", "int2")
"""Formats to try, from the one nearest to bfloat16 down."""


@dataclass(frozen=True)
class Change:
    """One change of one kind that fits. `keeps`: what it leaves as it was asked."""

    kind: str
    text: str
    keeps: str
    verdict: Verdict


def changes(request: CompileRequest) -> list[Change]:
    """Of each kind of change, the smallest that fits; empty where none does or it fits already."""
    if Verdict.of(request).fits:
        return []
    found: dict[str, Change] = {}
    for kind, text, keeps, candidate in _candidates(request):
        if kind in found:
            continue
        try:
            candidate.check()
            verdict = Verdict.of(candidate)
        except UserError:
            continue
        if verdict.fits:
            found[kind] = Change(kind, text, keeps, verdict)
    return list(found.values())


Candidate = tuple[str, str, str, CompileRequest]


def _candidates(request: CompileRequest) -> Iterator[Candidate]:
    """(kind, text, what it keeps, request), the nearest of each kind first."""
    training = request.program == "train"
    if training:
        yield from _remat(request)
        yield from _micro_batches(request)
    else:
        yield from _formats(request)
    yield from _meshes(request)
    if not training:
        yield from _contexts(request)
    yield from _batches(request)


def _remat(request: CompileRequest) -> Iterator[Candidate]:
    for remat in LIGHTER_REMAT[request.profile.remat]:
        profile = dataclasses.replace(request.profile, remat=remat)
        changed = dataclasses.replace(request, profile=profile)
        yield "remat", f"--remat {remat}", "batch, mesh", changed


def _micro_batches(request: CompileRequest) -> Iterator[Candidate]:
    rows = request.batch // shard_count(request.profile, BATCH)
    for parts in range(request.accumulate + 1, rows + 1):
        if rows % parts == 0:
            changed = dataclasses.replace(request, accumulate=parts)
            yield "micro-batches", f"--accumulate {parts}", "batch, mesh", changed


def _formats(request: CompileRequest) -> Iterator[Candidate]:
    bits = get_format(request.format).bits
    for name in SERVE_FORMATS:
        if get_format(name).bits < bits:
            changed = dataclasses.replace(request, format=name)
            yield "format", f"--format {name}", "batch, mesh, context", changed


def _meshes(request: CompileRequest) -> Iterator[Candidate]:
    """Meshes of as many devices, those that move the fewest factors of two first."""
    profile = request.profile
    axes = MESH_AXES[profile.role]
    sizes = [profile.mesh[axis] for axis in axes]
    moves = []
    for source in range(len(axes)):
        for sink in range(len(axes)):
            factor = 2
            while source != sink and sizes[source] % factor == 0:
                mesh = dict(profile.mesh)
                mesh[axes[source]] //= factor
                mesh[axes[sink]] *= factor
                moves.append((factor, mesh))
                factor *= 2
    for _, mesh in sorted(moves, key=lambda move: move[0]):
        changed = dataclasses.replace(request, profile=dataclasses.replace(profile, mesh=mesh))
        yield "mesh", f"--mesh {mesh_text(mesh)}", "batch, chips", changed


def _contexts(request: CompileRequest) -> Iterator[Candidate]:
    context = request.context // 2
    while context > request.prompt:
        changed = dataclasses.replace(request, context=context)
        yield "context", f"--context {context}", "batch, mesh, format", changed
        context //= 2


def _batches(request: CompileRequest) -> Iterator[Candidate]:
    step = shard_count(request.profile, BATCH) * request.accumulate
    flag = "--batch-size" if request.program == "train" else "--serve-batch"
    rows = request.batch // step
    for fewer in sorted({rows * k // 16 for k in range(15, 0, -1)} | {1}, reverse=True):
        if 0 < fewer < rows:
            changed = dataclasses.replace(request, batch=fewer * step)
            yield "batch", f"{flag} {fewer * step}", "mesh, lengths", changed
