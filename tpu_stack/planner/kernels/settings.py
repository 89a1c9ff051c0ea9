"""What the tuner tries: settings of a kernel that are distinct and fit VMEM.

>>> case = get_case("quantized_matmul", "int4", "bf16")
>>> distinct_settings(case, compile_target("v6e"), (16, 4096, 14336))[0].tiles
(16, 4096, 1024)
"""

from types import ModuleType

from tpu_stack.planner.kernels import (
    attention_settings,
    grouped_settings,
    matmul_settings,
    row_settings,
)
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.setting import Setting
from tpu_stack.planner.kernels.targets import CompileTarget, nearest

FAMILIES: dict[str, ModuleType] = {
    "quantized_matmul": matmul_settings,
    "grouped_matmul": grouped_settings,
    "kv_attention": attention_settings,
    "quantize_rows": row_settings,
}
"""Op -> the module with its `settings`."""
VMEM_SHARE = 0.9
"""Share of VMEM that a setting may take; the compiler needs the rest."""


def family_of(op: str) -> ModuleType:
    """The module with the op's `settings`. Raises UserError for an unknown op."""
    if op not in FAMILIES:
        raise nearest("op", op, list(FAMILIES))
    return FAMILIES[op]


def distinct_settings(case: Case, target: CompileTarget, shape: tuple[int, ...]) -> list[Setting]:
    """The distinct settings that the kernel accepts and that fit VMEM by a rough count. The current
    one comes first, whether it fits by this count or not. Raises UserError for an unknown op."""
    found: dict[tuple, Setting] = {}
    for setting in family_of(case.op).settings(case, target, shape):
        fits = setting.vmem_bytes <= VMEM_SHARE * target.vmem_bytes
        if not found or fits:
            found.setdefault((setting.tiles, setting.scale_mode), setting)
    return list(found.values())
