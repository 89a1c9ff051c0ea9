"""The answer to a compile in a person's words, with a shortcut to a cached one.

Reading names and choosing meshes needs JAX, which takes seconds to import. What those words came to
is therefore kept, under a digest of the words, the versions and all of the project's sources.

    compile_asked(Asked("llama3_8b", "v5p:4x4x4", "train"))
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tpu_stack.errors import UserError
from tpu_stack.files import write_json
from tpu_stack.planner.aot.asked import TIMEOUT_S, Asked
from tpu_stack.planner.aot.recompilation import digest_of, source_digests, versions
from tpu_stack.planner.aot.result import CompilerMissing, Result
from tpu_stack.planner.aot.store import Store


def compile_asked(
    asked: Asked,
    *,
    cache: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    stage: Callable[[str], None] = lambda name: None,
) -> Result:
    """`compile_program` of what was asked; without importing JAX where the answer is known.

    Raises UserError as `make_request` does, and for a time limit that is not positive.
    """
    if not timeout_s > 0:
        raise UserError(f"--timeout is {timeout_s:g}; it must be more than 0 seconds")
    store = Store(cache)
    words = asdict(asked) | versions() | source_digests(("",))
    shortcut = store.folder / "asked" / f"{digest_of(words)}.json"
    try:
        known = store.read(json.loads(shortcut.read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known is not None:
        return known
    stage("reading the request")
    from tpu_stack.planner.aot.compile import compile_program, key_of
    from tpu_stack.planner.aot.request import make_request

    request = make_request(asked)
    result = compile_program(request, cache=cache, timeout_s=timeout_s, stage=stage)
    if not isinstance(result, CompilerMissing):
        write_json(shortcut, {"digest": digest_of(key_of(request)), "asked": asdict(asked)})
    return result
