"""Compiles a program for a TPU that is not here, in a child process, through the cache on disk.

Example:
    from tpu_stack.planner.aot.spec import CompileSpec
    from tpu_stack.planner.aot.request import make_request
    result = compile_program(make_request(CompileSpec("llama3_8b", "v5p:4x4x4", "train")))
    result.memory.total_bytes, result.report.collectives
"""

import json
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.hardware.chips import get_chip
from tpu_stack.planner.aot.oom import read_oom
from tpu_stack.planner.aot.recompilation import digest_of, source_digests, versions
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.aot.result import (
    Aborted,
    Compiled,
    CompilerMissing,
    Memory,
    OutOfMemory,
    Refused,
    Result,
    Target,
    TimedOut,
)
from tpu_stack.planner.aot.spec import TIMEOUT_S
from tpu_stack.planner.aot.store import Store
from tpu_stack.planner.aot.target import topology_of
from tpu_stack.planner.compiler_child import CompilerChild, Deadline
from tpu_stack.planner.kernels.targets import COMPILE_TARGETS, has_compiler
from tpu_stack.quant.formats import get_format
from tpu_stack.serving.replicas import one_replica

CHILD = f"{__package__}.child"
_SOURCES = (
    *("models", "quant", "sharding", "kernels"),
    *("planner/programs.py", "planner/serve_programs.py", "planner/aot/child.py"),
)
MAX_REASON = 600


def compile_program(
    request: CompileRequest,
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    stage: Callable[[str], None] = lambda name: None,
) -> Result:
    """Compiles the program of `request` for its topology, or finds it in the cache.

    Args:
      cache: folder of results; `store.default_folder()` when None.
      timeout_s: a compile that takes longer is ended, and that is its result.
      stage: told what the child is doing, as it goes on to it.

    Returns: one of `result.Result`. A time-out, and an end from outside, are not kept.

    Raises: UserError for a request that is refused without a compile (`CompileRequest.check`).
    """
    request.check()
    store, digest = Store(cache), digest_of(key_of(request))
    kept = store.read(digest)
    if kept is not None:
        return kept
    if not has_compiler():
        return CompilerMissing()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.pickle").write_bytes(pickle.dumps(request))
        return _in_child(request, folder, store, Deadline(timeout_s), stage)


def target_of(request: CompileRequest) -> Target:
    """What a request is compiled for."""
    profile, topology = request.profile, topology_of(request.profile)
    chip, own = get_chip(topology.chip), profile.chip_facts
    return Target(
        topology=topology.name,
        chip=topology.chip,
        profile_chip=profile.chip,
        devices=topology.devices,
        mesh=_compiled_mesh(request),
        hbm_bytes=int(own.require("hbm_bytes")) // own.devices(1),
        compiler_hbm_bytes=int(chip.require("hbm_bytes")) // chip.devices(1),
        matmul=_matmul_text(request),
        wrap=topology.wrap,
        clock_hz=COMPILE_TARGETS[chip.name].clock_hz if chip.name in COMPILE_TARGETS else None,
    )


def _compiled_mesh(request: CompileRequest) -> dict[str, int]:
    """The mesh of the program: of the engine's, a slice of the data axis."""
    profile = request.profile
    return dict((profile if request.program == "train" else one_replica(profile)).mesh)


def _matmul_text(request: CompileRequest) -> str:
    if request.program == "train" or not get_format(request.format).quantized:
        return "plain products"
    where = "" if request.profile.devices == 1 else ", each device its part"
    return f"pallas (the kernel reads the weight packed{where})"


def key_of(request: CompileRequest) -> dict[str, Any]:
    """What makes the program of `request` a new one: statics, shapes, target, versions, sources.

    Its digest is the cache key; `recompilation.changed` compares two.
    """
    profile = request.profile
    role = "training" if request.program == "train" else "serving"
    sizes = ("batch", "seq_len", "accumulate", "context", "prompt")
    return {
        "program": request.program,
        "config": json.loads(json.dumps(asdict(request.config))),
        "topology": json.loads(json.dumps(asdict(topology_of(profile)))),
        "profile_chip": profile.chip,
        "mesh": dict(profile.mesh),
        "rules": {axis: list(axes) for axis, axes in profile.rules.table.items()},
        "precision": asdict(profile.precision),
        "remat": profile.remat if role == "training" else None,
        "format": request.format if role == "serving" else None,
        "shapes": {name: getattr(request, name) for name in sizes},
        "versions": versions(),
        "sources": source_digests((*_SOURCES, role)),
    }


def _in_child(
    request: CompileRequest,
    folder: Path,
    store: Store,
    deadline: Deadline,
    stage: Callable[[str], None],
) -> Result:
    start, target = time.monotonic(), target_of(request)
    with CompilerChild(CHILD, folder) as child:
        while line := child.next_line(deadline.left_s, '{"'):
            said = json.loads(line)
            if "end" in said:
                break
            stage(said["stage"])
        else:
            death = child.death(deadline.limit_s)
            if death.late:
                return TimedOut(target, deadline.limit_s)
            result = Aborted(target, death.message, time.monotonic() - start, cached=False)
            if death.lasting:
                store.keep(digest_of(key_of(request)), result)
            return result
    return _result(request, said["end"], folder, store, time.monotonic() - start)


def _result(
    request: CompileRequest, end: dict[str, Any], folder: Path, store: Store, seconds: float
) -> Result:
    """The child's last line as a result, kept in the store."""
    if "user_error" in end:
        raise UserError(end["user_error"])
    target, key = target_of(request), key_of(request)
    digest = digest_of(key)
    if "error" in end:
        message = " ".join(end["error"].split())[:MAX_REASON]
        oom = read_oom(end["error"])
        if oom is None:
            result = Refused(target, message, seconds, cached=False)
        else:
            result = OutOfMemory(target, message, **vars(oom), seconds=seconds, cached=False)
        store.keep(digest, result)
        return result
    hlo = store.keep_text(digest, (folder / "program.hlo.gz").read_bytes())
    result = Compiled(
        target=target,
        memory=Memory(**end["memory"]),
        **store.report(digest, target),
        hlo=hlo,
        matmul_flops=end["matmul_flops"],
        seconds=seconds,
        cached=False,
        compiler_bytes=end["compiler_bytes"],
        key=key,
    )
    store.keep(digest, result)
    return result
