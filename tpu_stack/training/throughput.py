"""Steps per second of a loop that runs ahead of its devices, and MFU where the chip is known.

A step counts when it has ended on the devices, not when it was dispatched, so figures are of work
done.

>>> clock = StepClock(now=iter([0.0, 60.0, 62.0]).__next__)
>>> clock.ended(step=1)
>>> clock.ended(step=9)
>>> clock.steps_per_s
4.0
"""

import time
from collections.abc import Callable

from jax.sharding import Mesh

from tpu_stack.hardware import chip_of_device_kind


class StepClock:
    """Time between the ends of steps, without the first step, which warms up, and without pauses.

    `running_s` is all time outside pauses since the clock was made, the first step's included.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._steps = 0
        self._seconds = 0.0
        self._last: tuple[int, float] | None = None  # a step and when it had ended
        self._warm = False
        self._running_s = 0.0
        self._resumed_at: float | None = now()

    def ended(self, step: int) -> None:
        """Notes that `step`, and all before it, have ended by now."""
        now = self._now()
        if self._last is not None:
            self._steps += step - self._last[0]
            self._seconds += now - self._last[1]
        self._last, self._warm = (step, now), True

    def pause(self) -> None:
        """Stops the clock; no step may be under way."""
        self._last = None
        if self._resumed_at is not None:
            self._running_s += self._now() - self._resumed_at
            self._resumed_at = None

    def resume(self, step: int) -> None:
        """Goes on; `step` was the last to end."""
        self._resumed_at = self._now()
        self._last = (step, self._resumed_at) if self._warm else None

    @property
    def running_s(self) -> float:
        """Seconds outside pauses."""
        now = 0.0 if self._resumed_at is None else self._now() - self._resumed_at
        return self._running_s + now

    @property
    def steps_per_s(self) -> float | None:
        """None before the second step has ended."""
        return self._steps / self._seconds if self._steps and self._seconds else None


def peak_flops_per_s(mesh: Mesh) -> float | None:
    """bf16 peak of the chips that JAX says the mesh is on; None for a CPU or an unknown chip.

    MFU counts the model's FLOPs, not the recomputed ones, against it (Chowdhery et al. 2022,
    appendix B).
    """
    chip = chip_of_device_kind(mesh.devices.flat[0].device_kind)
    if chip is None or chip.bf16_flops_per_s is None:
        return None
    return mesh.size / chip.devices(1) * chip.bf16_flops_per_s.number
