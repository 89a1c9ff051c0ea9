"""What a person asked to compile, as typed, and the shortcut from there to a cached answer.

Reading names and choosing meshes needs JAX, which takes seconds to import. What those words came to
is therefore kept, under a digest of the words, the versions and all of the project's sources.

>>> compile_asked(Asked("llama3_8b", "v5p:4x4x4", "train"))
"""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tpu_stack.errors import UserError
from tpu_stack.files import write_json
from tpu_stack.planner.aot.recompilation import digest_of, source_digests, versions
from tpu_stack.planner.aot.result import CompilerMissing, Result
from tpu_stack.planner.aot.store import Store

PROGRAMS = ("train", "prefill", "decode")
"""The train step, and the two programs of the serving engine (planner/serve_programs.py)."""
REMAT = ("full", "dots", "none")
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Asked:
    """A compile in the user's words. None: the default that `make_request` fills in.

    Attributes:
      model: preset. profile: NAME:TOPOLOGY. program: one of PROGRAMS.
      mesh: axis sizes, as in "fsdp=16,tensor=4". remat: one of REMAT; of a train step.
      batch_size, seq_len, accumulate: of a train step.
      format, serve_batch, context, prompt: of the others.
    """

    model: str
    profile: str
    program: str
    mesh: str | None = None
    format: str = "int4"
    batch_size: int | None = None
    seq_len: int | None = None
    accumulate: int = 1
    remat: str | None = None
    serve_batch: int | None = None
    context: int | None = None
    prompt: int | None = None


def nearest(what: str, word: str, known: Sequence[str]) -> UserError:
    """The error for a `word` that is none of `known`, with the nearest that is."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {word!r}; {hint}known: {', '.join(known)}")


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
