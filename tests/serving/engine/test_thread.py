"""The engine's thread where something breaks: nobody waits for ever."""

import pytest
from engine_model import engine

from tpu_stack.errors import UserError
from tpu_stack.serving.engine.thread import EngineThread


def fail() -> None:
    raise RuntimeError("this command fails")


def test_what_waits_behind_a_command_that_raises_still_ends(monkeypatch):
    monkeypatch.setattr("logging.Logger.exception", lambda *_: None)
    broken = engine()
    thread = EngineThread(broken, queue_limit=4, facts={})
    with thread._wake:  # both are there when the engine's thread wakes
        thread._commands.extend([fail, fail])
        later = thread.between_steps(lambda engine: engine.shapes.slots)
    assert later.result(timeout=60) == broken.shapes.slots
    thread._thread.join(timeout=60)
    assert not thread._thread.is_alive()
    with pytest.raises(UserError, match="shutting down"):
        thread.between_steps(lambda engine: None)
    thread.close()
