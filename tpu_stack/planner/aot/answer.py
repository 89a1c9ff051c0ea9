"""Compiles a spec, with a shortcut to a cached result.

Reading names and choosing meshes needs JAX, which takes seconds to import. The digest of the
program that a spec leads to is therefore kept, under a digest of the spec, the versions and all of
the project's sources.

    compile_spec(CompileSpec("llama3_8b", "v5p:4x4x4", "train"))
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tpu_stack.errors import UserError
from tpu_stack.files import write_json
from tpu_stack.planner.aot.recompilation import digest_of, source_digests, versions
from tpu_stack.planner.aot.result import CompilerMissing, Result
from tpu_stack.planner.aot.spec import TIMEOUT_S, CompileSpec
from tpu_stack.planner.aot.store import Store


def compile_spec(
    spec: CompileSpec,
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    stage: Callable[[str], None] = lambda name: None,
) -> Result:
    """`compile_program` of a spec; without importing JAX where the result is known.

    Raises UserError as `make_request` does, and for a time limit that is not positive.
    """
    if not timeout_s > 0:
        raise UserError(f"timeout is {timeout_s:g}; it must be more than 0 seconds")
    store = Store(cache)
    key = asdict(spec) | versions() | source_digests(("",))
    shortcut = store.folder / "specs" / f"{digest_of(key)}.json"
    try:
        known = store.read(json.loads(shortcut.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known is not None:
        return known
    stage("reading the request")
    from tpu_stack.planner.aot.compile import compile_program, key_of
    from tpu_stack.planner.aot.request import make_request

    request = make_request(spec)
    result = compile_program(request, cache=cache, timeout_s=timeout_s, stage=stage)
    if not isinstance(result, CompilerMissing):
        write_json(shortcut, {"digest": digest_of(key_of(request)), "spec": asdict(spec)})
    return result
