"""One model under two profiles. A room of its own, because the comparison has five independent
parts: what is stored and how it is multiplied, why it is sharded so, what moves between the two
layouts, what each program costs, and what each would cost on the other's chip.

    compare(make_request("llama3_8b", "8t:4x4x4", "8i:8"))["two_by_two"][0]["bound"]
"""

from tpu_stack.planner.compare.comparison import PROGRAMS, STEPS, compare
from tpu_stack.planner.request import Request, devices_wanted, make_request

__all__ = ["PROGRAMS", "STEPS", "Request", "compare", "devices_wanted", "make_request"]
