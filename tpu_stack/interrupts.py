"""Ctrl-C that is neither lost nor fatal, whatever Python is doing when it comes.

Python raises KeyboardInterrupt wherever it stands. Inside the import of an extension module that
aborts the process, and inside a finalizer or a callback of the garbage collector it is printed and
forgotten. `catch_ctrl_c` waits for imports to end, raises again what was swallowed, and remembers
that it was asked, so that a long loop can look.

>>> catch_ctrl_c()
>>> requested()
False
"""

import signal
import sys
import threading
from types import FrameType
from typing import Any

_RETRY_S = 0.05
_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"
_asked = False


def requested() -> bool:
    """Whether Ctrl-C has come since `catch_ctrl_c`, be it that its exception was swallowed."""
    return _asked


def catch_ctrl_c() -> None:
    """Raises KeyboardInterrupt on Ctrl-C, but not before a running import has ended.

    Takes SIGINT, SIGALRM and the hook for unraisable exceptions; does nothing outside the main
    thread or where there is no SIGALRM.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
        _raise_again_what_is_swallowed()


def _raise_again_what_is_swallowed() -> None:
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, _RETRY_S)
        else:
            previous(unraisable)

    sys.unraisablehook = hook


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    if _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _RETRY_S)
        return
    raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_MACHINERY:
            return True
        frame = frame.f_back
    return False
