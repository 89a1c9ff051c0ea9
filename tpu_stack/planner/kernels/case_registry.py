"""The registry of cases: one `Case` per op, format and activation dtype.

`verify`, `profile`, `tune` and the matrix in kernels/README.md read it, so every registered kernel
is verified on rungs 1 to 3 or listed as failing.

>>> [case.name for case in find_cases(format="int4", activation="bf16")]
['quantized_matmul int4 bf16', 'grouped_matmul int4 bf16']
"""

import functools
from types import ModuleType

from tpu_stack.errors import UserError
from tpu_stack.planner.kernels import attention_cases, grouped_cases, matmul_cases, row_cases
from tpu_stack.planner.kernels.cases import Case
from tpu_stack.planner.kernels.targets import nearest

FAMILIES: dict[str, ModuleType] = {
    "quantized_matmul": matmul_cases,
    "grouped_matmul": grouped_cases,
    "kv_attention": attention_cases,
    "quantize_rows": row_cases,
}
"""Op -> the module with its `cases()` and `make_case(format, activation)`."""


@functools.cache
def candidates() -> tuple[Case, ...]:
    """Every case of every op, also those that the kernel refuses; nothing is traced."""
    return tuple(case for family in FAMILIES.values() for case in family.cases())


@functools.cache
def registry() -> tuple[Case, ...]:
    """Every case that the kernel accepts, in the order of the published matrix."""
    return tuple(case for case in candidates() if case.refusal() is None)


def get_case(op: str, format: str, activation: str) -> Case:
    """The case of an op, format and activation. Raises KeyError for an unknown name."""
    return FAMILIES[op].make_case(format, activation)


def find_cases(
    op: str | None = None, format: str | None = None, activation: str | None = None
) -> list[Case]:
    """The cases that match and that the kernel accepts; None matches all.

    Raises: UserError for an unknown name, with the nearest one, and when no case matches, with the
      kernel's reason.
    """
    found = list(candidates())
    for field, requested in (("op", op), ("format", format), ("activation", activation)):
        if requested is None:
            continue
        known = list(dict.fromkeys(getattr(case, field) for case in candidates()))
        if requested not in known:
            raise nearest(field, requested, known)
        found = [case for case in found if getattr(case, field) == requested]
    able = [case for case in found if case.refusal() is None]
    if not able:
        requested = ", ".join(word or "any" for word in (op, format, activation))
        why = found[0].refusal() if found else "no such pair is registered"
        raise UserError(f"no kernel takes op, format, activation {requested}: {why}")
    return able
