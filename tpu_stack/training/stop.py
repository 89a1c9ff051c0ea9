"""Stopping between two steps: SIGTERM and Ctrl-C ask, the loop saves and leaves.

Example:
    with StopRequest() as stop:
        while not stop.signal: ...
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from tpu_stack import interrupts


class StopRequest:
    """`signal` is the number of the signal received, before it began or since, or None.

    A second Ctrl-C interrupts at once.

    Outside the main thread, where Python takes no handlers, it never becomes set.
    """

    def __init__(self) -> None:
        self.signal: int | None = int(signal.SIGINT) if interrupts.requested() else None
        self._previous: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
