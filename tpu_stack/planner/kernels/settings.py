"""What the tuner tries: settings of a kernel that are distinct and fit VMEM.

>>> distinct_settings(make_case("int4", "bf16"), compile_target("v6e"), (16, 4096, 14336))[0].tiles
(16, 4096, 1024)
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.targets import CompileTarget, nearest

VMEM_SHARE = 0.9
"""Of VMEM that a setting's blocks may take; the compiler needs the rest."""


@dataclass(frozen=True)
class Setting:
    """One way to call a kernel.

    Attributes:
      tiles: the blocks, as the kernel's `tiles` takes them.
      scale_mode: where scales of weights are applied; None for ops without, and for several ways.
      block_bytes: what the first grid step loads and its results' block.
      call_bytes: what a call moves; where data decide, the average one (`step_share`).
      vmem_bytes: what it needs of VMEM, roughly.
      step_share: of the grid's steps, those that the average call does; data decide on the rest.
    """

    tiles: tuple[int, ...]
    scale_mode: str | None
    block_bytes: float
    call_bytes: float
    vmem_bytes: float
    step_share: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Of `Case.call`."""
        found: dict[str, Any] = {"tiles": list(self.tiles)}
        return found if self.scale_mode is None else found | {"scale_mode": self.scale_mode}


def family_of(op: str) -> ModuleType:
    """The module with the op's `settings`. Raises UserError for an unknown op."""
    from tpu_stack.planner.kernels import (
        attention_settings,
        grouped_settings,
        matmul_settings,
        row_settings,
    )

    families = {
        "quantized_matmul": matmul_settings,
        "grouped_matmul": grouped_settings,
        "kv_attention": attention_settings,
        "quantize_rows": row_settings,
    }
    if op not in families:
        raise nearest("op", op, list(families))
    return families[op]


def distinct_settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> list[Setting]:
    """The distinct settings that the kernel takes and that fit VMEM; the current one first, which
    need not fit by this rough count."""
    found: dict[tuple, Setting] = {}
    for setting in family_of(case.op).settings(case, target, shape):
        fits = setting.vmem_bytes <= VMEM_SHARE * target.vmem_bytes
        if not found or fits:
            found.setdefault((setting.tiles, setting.scale_mode), setting)
    return list(found.values())
