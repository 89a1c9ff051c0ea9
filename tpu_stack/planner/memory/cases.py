"""Programs whose memory the compiler has given, beside the prediction: train steps, and twelve of
the serving engine's, dense models and mixtures of experts.

`cases.json` holds the compiler's figures and its version, taken from compiled programs; the
predictor does not read them. `tpu-stack plan memory --cases --confirm` compiles every case and
records it anew.

    [(row.case.name, row.error) for row in rows()]
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tpu_stack.files import write_json
from tpu_stack.models.presets import get_preset
from tpu_stack.planner.aot.recompilation import versions
from tpu_stack.planner.aot.request import CompileRequest, make_request
from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.planner.memory.predict import Verdict

RECORD = Path(__file__).with_name("cases.json")


@dataclass(frozen=True)
class Case:
    """A request by name. `layers`: fewer than the preset's, None for its own. `seen`: the formulas
    were written with this program's figures in view; the others were predicted before."""

    name: str
    spec: CompileSpec
    seen: bool
    layers: int | None = None

    def request(self) -> CompileRequest:
        """The request to predict and compile."""
        config = get_preset(self.spec.model)
        config = config.replace(n_layers=self.layers) if self.layers else config
        return make_request(self.spec, config)


def _train(model: str, profile: str, **more: Any) -> CompileSpec:
    return CompileSpec(model, profile, "train", **more)


def _serve(model: str, profile: str, program: str, format: str, **more: Any) -> CompileSpec:
    return CompileSpec(model, profile, program, format=format, **more)


_SMALL, _LLAMA, _QWEN = "qwen3_0_6b", "llama3_8b", "qwen3_8b"
_EXPERTS, _MIXTRAL, _NARROW = "qwen3_30b_a3b", "mixtral_8x7b", "smollm2_135m"
TRAIN_CASES = (
    Case("train, fsdp, v5p", _train(_LLAMA, "v5p:4x4x4"), True),
    Case("train, fsdp, 7x", _train(_LLAMA, "7x:2x2x1", batch_size=32, seq_len=2048), True),
    Case("train, fsdp, v5e", _train(_SMALL, "v5e:2x2", batch_size=8, seq_len=1024), False),
    Case("train, too large, v5e", _train(_QWEN, "v5e:4x4", batch_size=64, seq_len=4096), False),
    Case("train, tensor, v5e, 4 layers",
         _train(_SMALL, "v5e:2x2", batch_size=8, seq_len=1024, mesh="tensor=4"), True, 4),
)  # fmt: skip
SERVE_CASES = (
    Case("decode, one device, v5e",
         _serve(_SMALL, "v5e:1x1", "decode", "int4", serve_batch=32, context=2048), True),
    Case("prefill, one device, v5e, 3 layers",
         _serve(_SMALL, "v5e:1x1", "prefill", "int4", serve_batch=32, context=2048), True, 3),
    Case("decode, tensor, v5e, 4 layers",
         _serve(_LLAMA, "v5e:2x2", "decode", "int4", serve_batch=16, context=4096), False, 4),
    Case("prefill, tensor, v5p, bf16, 3 layers",
         _serve(_LLAMA, "v5p:2x2x1", "prefill", "bf16", serve_batch=16, context=4096), True, 3),
    Case("decode, data and tensor, 7x, 3 layers",
         _serve(_LLAMA, "7x:2x2x1", "decode", "int8", serve_batch=32, context=4096,
                mesh="data=2,tensor=4"), True, 3),
    Case("decode, heads of 64, v6e, 3 layers",
         _serve(_NARROW, "v6e:1x1", "decode", "int8", serve_batch=32, context=4096), True, 3),
    Case("decode, experts, v6e, 2 layers",
         _serve(_EXPERTS, "v6e:2x2", "decode", "int4", serve_batch=16, context=4096), True, 2),
    Case("prefill, experts, v6e, 2 layers",
         _serve(_EXPERTS, "v6e:2x2", "prefill", "int4", serve_batch=16, context=4096), True, 2),
    Case("decode, experts, v5p, 2 layers",
         _serve(_MIXTRAL, "v5p:2x2x1", "decode", "int8", serve_batch=64, context=2048), False, 2),
    Case("prefill, experts, 7x, 2 layers",
         _serve(_MIXTRAL, "7x:2x2x1", "prefill", "int8", serve_batch=16, context=4096), False, 2),
    Case("decode, too large, v6e, 2 layers",
         _serve(_QWEN, "v6e:1x1", "decode", "int8", serve_batch=512, context=16_384), False, 2),
    Case("prefill, too large, v5e, 4 layers",
         _serve(_LLAMA, "v5e:1x1", "prefill", "bf16", serve_batch=256, context=8192), False, 4),
)  # fmt: skip
CASES = TRAIN_CASES + SERVE_CASES


@dataclass(frozen=True)
class Row:
    """A case, what is predicted, and what the compiler gave (None: never compiled)."""

    case: Case
    verdict: Verdict
    compiled: dict[str, Any] | None

    @property
    def error(self) -> float | None:
        """Predicted over compiled, less 1."""
        if self.compiled is None:
            return None
        return self.verdict.prediction.total_bytes / self.compiled["total_bytes"] - 1

    @property
    def agrees(self) -> bool | None:
        """Whether both say that it fits, or both that it does not."""
        return None if self.compiled is None else self.verdict.fits == self.compiled["fits"]


@lru_cache(maxsize=1)
def recorded() -> dict[str, Any]:
    """What was recorded: case -> the compiler's figures in bytes."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def rows() -> list[Row]:
    """Every case predicted, beside what was recorded of it."""
    return [Row(case, Verdict.of(case.request()), recorded().get(case.name)) for case in CASES]


def record(
    case: Case, timeout_s: float, stage: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """Compiles a case and records what came of it; raises UserError as `confirm` does."""
    from tpu_stack.planner.memory.confirm import confirm

    found = confirm(case.request(), timeout_s=timeout_s, stage=stage)
    figures = {
        "fits": found.fits,
        "total_bytes": found.total_bytes,
        "temporary_bytes": found.temporary_bytes,
        "held_bytes": found.held_bytes,
        "exact": found.exact,
        "libtpu": versions().get("libtpu"),
        "spec": asdict(case.spec),
    }
    write_json(RECORD, recorded() | {case.name: figures})
    recorded.cache_clear()
    return figures
