"""The transformers peer: what is said when it cannot run. Where torch is, it is run by hand."""

import sys
from pathlib import Path

import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.presets import get_preset
from tpu_stack.serving.bench.peer import TransformersPeer
from tpu_stack.serving.requests import GenerationRequest

ASKED = [GenerationRequest((1, 2, 3), 4)]


def test_an_interpreter_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--peer-python .*nowhere"):
        TransformersPeer(tmp_path / "nowhere", get_preset("nano"), ASKED, 8, "float32")


def interpreter(folder: Path, program: str) -> Path:
    """A stand-in, which runs this in place of the script that it is given."""
    fake, script = folder / "python", folder / "program.py"
    script.write_text(program)
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    fake.chmod(0o755)
    return fake


READY = """
import json, sys
config, asked = json.load(open(sys.argv[2] + "/config.json")), json.load(open(sys.argv[3]))
said = {"width": config["hidden_size"], "asked": asked, "rest": sys.argv[4:]}
print(json.dumps(said), flush=True)
"""


def test_what_went_wrong_in_the_peer_is_its_last_line(tmp_path):
    fake = interpreter(tmp_path, "import sys; sys.exit('ModuleNotFoundError: no torch here')")
    with pytest.raises(UserError, match="ModuleNotFoundError: no torch here"):
        TransformersPeer(fake, get_preset("nano"), ASKED, 8, "float32")


def test_the_peer_is_given_the_shape_and_the_requests_and_runs_when_told(tmp_path):
    """A stand-in interpreter reads what the script would, and says how long its runs took."""
    answers = """for seconds, line in zip((0.5, 0.25), sys.stdin):
    assert line == "run\\n"
    print(json.dumps({"seconds": seconds}), flush=True)
sys.exit("out of memory")"""
    fake = interpreter(tmp_path, READY + answers)
    with TransformersPeer(fake, get_preset("qwen3_0_6b"), ASKED, 8, "bfloat16") as peer:
        assert peer.facts["width"] == 1024
        assert peer.facts["asked"] == [{"prompt": [1, 2, 3], "new": 4}]
        assert peer.facts["rest"] == ["--batch", "8", "--dtype", "bfloat16"]
        assert [peer.run(), peer.run()] == [8.0, 16.0]  # four new tokens
        with pytest.raises(UserError, match="failed: out of memory"):
            peer.run()
    assert peer._process.poll() is not None
