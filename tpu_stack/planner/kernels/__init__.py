"""Kernels verified without a TPU (rungs 1 to 3), profiled statically, tuned and explained.

Example:
    from tpu_stack.planner.kernels import find_cases, verify_cases
    verify_cases(find_cases(format="int4"), chips=["v6e"])[0]["failed"]  # []
"""

from tpu_stack.planner.kernels.case_registry import find_cases, registry
from tpu_stack.planner.kernels.cases import Case, parse_shape
from tpu_stack.planner.kernels.compile import Compiled, Job, compile_case, compile_jobs
from tpu_stack.planner.kernels.verify import verify_cases

__all__ = [
    "Case",
    "Compiled",
    "Job",
    "compile_case",
    "compile_jobs",
    "find_cases",
    "parse_shape",
    "registry",
    "verify_cases",
]
