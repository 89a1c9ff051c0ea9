"""The verb `serve`: how it starts, what it refuses, and how it ends. The engine is a fake one."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from tpu_stack.cli.main import parse
from tpu_stack.cli.serve import http as serve
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import build_tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.bundle import write_bundle

FAKES = Path(__file__).parent.parent / "serving" / "http"
MODEL = ModelConfig(
    vocab_size=64, d_model=64, n_layers=1, n_heads=8, n_kv_heads=8, head_dim=8, d_ff=64
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle without tensors: enough for an engine that reads none."""
    out = tmp_path_factory.mktemp("serve") / "empty"
    text = "".join(map(chr, range(ord(" "), ord(" ") + 50)))
    write_bundle(out, MODEL, "bf16", build_tokenizer("chars", [Document(text, "text")]), {}, ())
    return out


def run(argv: list[str]) -> None:
    serve.run(parse("serve", serve.Options, argv))


def test_a_port_in_use_is_one_line_before_anything_is_loaded(bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"port {port} is in use; choose another --port"):
            run([str(bundle), "--port", port])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "65536"], "--port is 65536"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--drain-s", "-1"], "--drain-s is -1"),
        (["--slots", "0"], "slots is 0"),
        (["--limits.body-bytes", "0"], "--limits.body-bytes is 0"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_are_named(bundle, argv, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        run([str(bundle), *argv])
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_keys_is_refused(bundle, tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n\n")
    with pytest.raises(UserError, match="holds no key"):
        run([str(bundle), "--port", "0", "--api-key-file", str(empty)])


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a bundle"):
        run([str(tmp_path), "--port", "0"])


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], {"localhost", "127.0.0.1", "[::1]"}),
        (["--host", "::1"], {"localhost", "127.0.0.1", "[::1]"}),
        (["--host", "127.0.0.2"], {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}),
        (["--allow-host", "Chat.Example"], {"localhost", "127.0.0.1", "[::1]", "chat.example"}),
        (["--host", "0.0.0.0"], None),
        (
            ["--host", "10.0.0.7", "--allow-host", "chat.example"],
            {"localhost", "127.0.0.1", "[::1]", "10.0.0.7", "chat.example"},
        ),
    ],
)
def test_the_names_it_answers_to(bundle, argv, names):
    assert serve._names(parse("serve", serve.Options, [str(bundle), *argv])) == names


PROGRAM = textwrap.dedent(
    """
    import sys
    sys.path.insert(0, sys.argv[1])
    from fake_service import FakeService
    from tpu_stack.serving import launch
    from tpu_stack.sharding.profiles import get_profile
    launch.start_engine = lambda weights, where, engine: launch.Served(
        FakeService(vocab_size=64, slots=engine.slots, step_s=0.05),
        get_profile(where.profile, "serve").emulate(1),
        weights,
    )
    from tpu_stack.cli.serve import http as serve
    from tpu_stack.cli.main import parse
    serve.run(parse("serve", serve.Options, sys.argv[2:]))
    """
)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_it_serves_and_drains(bundle, tmp_path, number):
    """What is in flight at the signal ends well, and the status is 0."""
    said = tmp_path / "serve.json"
    command = [sys.executable, "-c", PROGRAM, str(FAKES), str(bundle), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--json", str(said), "--name", "tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    deadline = time.monotonic() + 60
    while not said.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    url = json.loads(said.read_text())["url"]
    body = {"model": "tiny", "prompt": "ABC", "max_tokens": 12, "stream": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        first = response.readline()
        process.send_signal(number)
        rest = response.read().decode()
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in rest
    (line,) = out.strip().splitlines()
    for word in ("tiny (bf16)", url, "emulated on CPU", "mesh "):
        assert word in line
