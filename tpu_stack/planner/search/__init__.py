"""Which mesh, batch, format and remat: every legal choice simulated, the best few compiled.

Example:
    from tpu_stack.planner.search import Ask, search
    search(Ask("llama3_8b", ("v6e:64",), "train-throughput")).best[0].candidate.mesh
"""

from tpu_stack.planner.search.ask import Ask
from tpu_stack.planner.search.find import Found, search
from tpu_stack.planner.search.goals import GOALS

__all__ = ["GOALS", "Ask", "Found", "search"]
