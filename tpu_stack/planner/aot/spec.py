"""The spec of a compile, as typed: free of JAX, which takes seconds to import.

Example:
    CompileSpec("llama3_8b", "v5p:4x4x4", "train")
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from tpu_stack.errors import UserError

PROGRAMS = ("train", "prefill", "decode")
"""The train step, and the two programs of the serving engine (planner/serve_programs.py)."""
REMAT = ("full", "dots", "none")
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class CompileSpec:
    """What to compile, by names and sizes. None: the default that `make_request` fills in.

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
