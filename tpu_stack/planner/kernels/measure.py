"""Wall-clock time of tuned candidates, where this machine has their chip (rung 5).

Example:
    local_chip()  # on a v6e host; None on a laptop  # 'v6e'
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from tpu_stack.hardware import chip_of_device_kind
from tpu_stack.planner.kernels.cases import Case

SEED = 0


def local_chip() -> str | None:
    """The name in `CHIP_NAMES` of the first local device's chip; None when it is no TPU."""
    chip = chip_of_device_kind(jax.local_devices()[0].device_kind)
    return None if chip is None or chip.name == "cpu" else chip.name


def median_seconds(call: Callable[[], Any], calls: int = 20, rounds: int = 5) -> float:
    """Seconds of one call: the median of `rounds`, each of `calls` dispatched without waiting.

    A first call, which compiles, is not timed.
    """
    jax.block_until_ready(call())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results)
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def measure(case: Case, shape: tuple[int, ...], **options: Any) -> float:
    """Seconds of one call of the case on the local TPU, its operands in device memory."""
    operands = jax.device_put(case.operands(shape, SEED))
    function = jax.jit(lambda a: case.call(a, interpret=False, **options))
    return median_seconds(lambda: function(operands))
