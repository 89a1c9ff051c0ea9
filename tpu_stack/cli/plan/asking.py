"""The options that name one program of one model on one slice, as `compile` and `memory` take them.

>>> ProgramOptions(model="llama3_8b", profile="v5p:4x4x4").asked()
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tpu_stack.planner.aot.asked import Asked


@dataclass(frozen=True)
class ProgramOptions:
    """A program in the user's words; verbs derive from it."""

    model: str = "llama3_8b"
    """Preset."""
    profile: str = "v5p:4x4x4"
    """NAME:TOPOLOGY, counting chips."""
    program: Literal["train", "prefill", "decode", "engine-prefill", "engine-decode"] = "train"
    """Which program; an engine's are those that `tpu-stack serve` runs, with a paged cache."""
    mesh: str | None = None
    """Axis sizes, such as fsdp=16,tensor=4; the default is the profile's, made to divide."""
    format: str = "int4"
    """What serving stores the weights as; any format of `tpu-stack pack`."""
    batch_size: int | None = None
    """Sequences per train step; the default makes about 8192 tokens a device."""
    seq_len: int | None = None
    """Tokens per training sequence (default 4096)."""
    accumulate: int = 1
    """Micro-batches a train step is split into."""
    remat: Literal["full", "dots", "none"] | None = None
    """What the backward pass recomputes (default: the profile's)."""
    serve_batch: int | None = None
    """Rows decoded together (default 16 per way of the data axis)."""
    context: int | None = None
    """Positions that the cache holds per row (default 4096)."""
    prompt: int | None = None
    """Tokens of each row that prefill runs (default 1024); an engine's prefill has its own."""
    timeout: float = 1800.0
    """Seconds after which a compile is ended."""

    def asked(self) -> "Asked":
        """The same for the planner, without what only a verb needs."""
        from tpu_stack.planner.aot.asked import Asked

        return Asked(**{field.name: getattr(self, field.name) for field in fields(Asked)})
