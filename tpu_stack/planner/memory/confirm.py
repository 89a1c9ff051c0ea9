"""The compiler's own figure beside the prediction (rung 3), and whose its largest buffers are.

Example:
    found = confirm(request)
    found.total_bytes, found.fits, found.largest[0]
"""

from collections.abc import Callable
from dataclasses import dataclass

from tpu_stack.errors import UserError
from tpu_stack.planner.aot.compile import compile_program
from tpu_stack.planner.aot.request import CompileRequest
from tpu_stack.planner.aot.result import Compiled, CompilerMissing, OutOfMemory
from tpu_stack.planner.aot.spec import TIMEOUT_S
from tpu_stack.planner.hlo_text import parse
from tpu_stack.planner.memory.buffers import most_held
from tpu_stack.planner.memory.owners import Held, label
from tpu_stack.planner.memory.predict import limit_of, predict
from tpu_stack.planner.memory.prediction import total

LARGEST = 10


@dataclass(frozen=True)
class Confirmed:
    """What the compiler says of a request, in bytes of one device.

    Attributes:
      fits: a program came of it, and with what lies beside it (`Prediction.beside`) it needs no
        more than the limit.
      total_bytes: arguments, outputs that reuse none, temporaries and code. Where the compiler gave
        up, the figure it names: it says "HLO temporaries", but counts arguments among them (a
        decode whose weights and two caches are 71.49 GiB was refused for 71.49 GiB).
      temporary_bytes: of these, None where it gave up.
      held_bytes: of the buffers live together at the highest, arguments too, by the program's own
        text; None without a program. What the heap wastes is the rest.
      largest: of these buffers, or of what the compiler lists.
      exact: the compiler made the program; False where it gave up.
    """

    fits: bool
    total_bytes: int
    temporary_bytes: int | None
    held_bytes: int | None
    largest: tuple[Held, ...]
    exact: bool


def confirm(
    request: CompileRequest,
    *,
    timeout_s: float = TIMEOUT_S,
    stage: Callable[[str], None] = lambda name: None,
) -> Confirmed:
    """Compiles a request, or finds it in the cache. Raises UserError where there is no answer: no
    compiler, a time-out, a refusal for another reason than memory."""
    result = compile_program(request, timeout_s=timeout_s, stage=stage)
    if isinstance(result, Compiled):
        return _read(result, request)
    if isinstance(result, OutOfMemory) and result.used_bytes is not None:
        listed = tuple(Held(a.bytes, a.shape, a.operator, a.kind) for a in result.largest[:LARGEST])
        return Confirmed(False, result.used_bytes, None, None, listed, exact=False)
    if isinstance(result, CompilerMissing):
        raise UserError(result.message)
    raise UserError(f"the compiler gave no figure: {getattr(result, 'message', 'timed out')}")


def _read(result: Compiled, request: CompileRequest) -> Confirmed:
    text, memory = result.hlo_text(), result.memory
    beside = total(predict(request).beside)
    held = most_held(parse(text), text.split("\n", 1)[0])
    return Confirmed(
        fits=memory.total_bytes + beside <= limit_of(request.profile),
        total_bytes=memory.total_bytes,
        temporary_bytes=memory.temporaries,
        held_bytes=sum(buffer.bytes for buffer in held),
        largest=tuple(label(held[:LARGEST], request, text)),
        exact=True,
    )
