"""New weights under a running server: `kill -USR1 PID` reads the bundle again.

A training loop writes a bundle beside the old one, points a symbolic link to it, and sends the
signal; no request is lost and nothing is compiled. A bundle that does not fit is reported on
standard error, and the old weights stay.

    wanted = catch_reloads()
    served = start_engine(weights, where, options)  # a signal that comes meanwhile is not lost
    reload_when(wanted, lambda: served.reload("finish"))
"""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tpu_stack.errors import UserError


def catch_reloads() -> threading.Event:
    """An event that every later SIGUSR1 sets; on a system without the signal, nothing does."""
    wanted = threading.Event()
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda number, frame: wanted.set())
    return wanted


def reload_when(wanted: threading.Event, reload: Callable[[], Path]) -> None:
    """Runs `reload` on a thread whenever `wanted` is set; signals during a run cause one more."""

    def work() -> None:
        while True:
            wanted.wait()
            wanted.clear()
            _say(reload)

    threading.Thread(target=work, name="reload", daemon=True).start()


def _say(reload: Callable[[], Path]) -> None:
    try:
        line = f"reloaded {reload()}: new requests get its weights"
    except UserError as error:
        line = f"not reloaded: {error}"
    except Exception as error:  # out of memory, for one: the server must go on
        line = f"not reloaded: {type(error).__name__}: {error}"
    print(line.replace("\n", " "), file=sys.stderr, flush=True)
