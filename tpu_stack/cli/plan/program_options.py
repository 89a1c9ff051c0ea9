"""The options of `compile` and `memory` that name one program of one model on one slice.

Example:
    ProgramOptions(model="llama3_8b", profile="v5p:4x4x4").spec()
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tpu_stack.planner.aot.spec import CompileSpec


@dataclass(frozen=True)
class ProgramOptions:
    """The options of one program; verbs inherit from it."""

    model: str = "llama3_8b"
    """Preset."""
    profile: str = "v5p:4x4x4"
    """NAME:TOPOLOGY, counting chips."""
    program: Literal["train", "prefill", "decode"] = "train"
    """Which program; prefill and decode are those that `tpu-stack serve` runs."""
    mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the nearest legal mesh."""
    format: str = "int4"
    """Weight format of serving; any format of `tpu-stack pack`."""
    batch_size: int | None = None
    """Sequences per train step; the default makes about 8192 tokens a device."""
    seq_len: int | None = None
    """Tokens per training sequence (default 4096, at most the model's window)."""
    accumulate: int = 1
    """Micro-batches a train step is split into."""
    remat: Literal["full", "dots", "none"] | None = None
    """What the backward pass recomputes (default: the profile's)."""
    serve_batch: int | None = None
    """Sequences decoded together (default 16 per data-parallel replica)."""
    context: int | None = None
    """Positions that the cache holds per row (default 4096, at most the model's window)."""
    prompt: int | None = None
    """Tokens of a prompt (default 1024, at most half the context); prefill runs it in chunks of at
    most 256."""
    timeout: float = 1800.0
    """Seconds after which a compile is ended."""

    def spec(self) -> "CompileSpec":
        """The `CompileSpec` of these options, without those of a verb alone."""
        from tpu_stack.planner.aot.spec import CompileSpec

        names = [field.name for field in fields(CompileSpec)]
        return CompileSpec(**{name: getattr(self, name) for name in names})
