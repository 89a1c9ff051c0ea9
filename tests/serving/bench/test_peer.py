"""The transformers peer: what is said when it cannot run. Where torch is, it is run by hand."""

import sys
from pathlib import Path

import pytest

from tpu_stack.errors import UserError
from tpu_stack.models.presets import get_preset
from tpu_stack.serving.bench.peer import run_transformers
from tpu_stack.serving.requests import GenerationRequest

ASKED = [GenerationRequest((1, 2, 3), 4)]


def test_an_interpreter_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--peer-python .*nowhere"):
        run_transformers(tmp_path / "nowhere", get_preset("nano"), ASKED, 8, "float32")


def test_what_went_wrong_in_the_peer_is_its_last_line(tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no torch here' >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match="ModuleNotFoundError: no torch here"):
        run_transformers(fake, get_preset("nano"), ASKED, 8, "float32")


def test_the_peer_is_given_the_shape_and_the_requests(tmp_path):
    """A stand-in interpreter reads what the script would, and answers with it."""
    fake = tmp_path / "python"
    program = (
        "import json,sys; c=json.load(open(sys.argv[2]+'/config.json'));"
        " r=json.load(open(sys.argv[3]));"
        " print(json.dumps({'width': c['hidden_size'], 'asked': r, 'rest': sys.argv[4:]}))"
    )
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{program}" "$@"\n')
    fake.chmod(0o755)
    said = run_transformers(Path(fake), get_preset("qwen3_0_6b"), ASKED, 8, "bfloat16", 3)
    assert said["width"] == 1024
    assert said["asked"] == [{"prompt": [1, 2, 3], "new": 4}]
    assert said["rest"] == ["--batch", "8", "--dtype", "bfloat16", "--repeats", "3"]
