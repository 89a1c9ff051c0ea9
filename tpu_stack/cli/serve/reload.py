"""New weights under a running server: `kill -USR1 PID` reads the bundle again.

A training loop writes a bundle beside the old one, turns a link to it, and sends the signal; no
request is lost and nothing is compiled. What does not fit is said, and the old weights go on.

>>> reload_on_signal(lambda: served.reload("finish"))
"""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tpu_stack.errors import UserError


def reload_on_signal(reload: Callable[[], Path]) -> None:
    """Runs `reload` on a thread at every SIGUSR1; signals that come meanwhile are one more run.

    Nothing happens on systems without the signal.
    """
    if not hasattr(signal, "SIGUSR1"):
        return
    wanted = threading.Event()

    def work() -> None:
        while True:
            wanted.wait()
            wanted.clear()
            _say(reload)

    threading.Thread(target=work, name="reload", daemon=True).start()
    signal.signal(signal.SIGUSR1, lambda number, frame: wanted.set())


def _say(reload: Callable[[], Path]) -> None:
    try:
        line = f"reloaded {reload()}: new requests get its weights"
    except UserError as error:
        line = f"not reloaded: {error}"
    except Exception as error:  # out of memory, for one: the server must go on
        line = f"not reloaded: {type(error).__name__}: {error}"
    print(line.replace("\n", " "), file=sys.stderr, flush=True)
