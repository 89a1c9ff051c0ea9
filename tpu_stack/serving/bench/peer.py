"""Runs `transformers` on the same requests, in an interpreter that has it.

>>> peer = run_transformers(Path("/opt/torch/bin/python"), config, requests, 8, "float32")
>>> peer["new_tokens_per_s"]
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.write_config import write_config
from tpu_stack.serving.requests import GenerationRequest

SCRIPT = Path(__file__).with_name("transformers_peer.py")


def run_transformers(
    python: Path,
    config: ModelConfig,
    requests: Sequence[GenerationRequest],
    batch: int,
    dtype: str,
    repeats: int = 1,
) -> dict[str, Any]:
    """The peer's figures. Its weights are random: of a bundle, it shares the shape.

    Raises UserError where `python` does not run or lacks torch, or no architecture of
    `transformers` has this shape.
    """
    _, body = write_config(config)
    asked = [{"prompt": list(r.prompt), "new": r.max_tokens} for r in requests]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(body), encoding="utf-8")
        (path / "requests.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [str(python), str(SCRIPT), folder, str(path / "requests.json"),
                   "--batch", str(batch), "--dtype", dtype,
                   "--repeats", str(repeats)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise UserError(f"--peer-python {python}: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the transformers peer under {python} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
