"""`transformers` on the same requests, in an interpreter that has it, turn by turn with the engine.

Example:
    with TransformersPeer(Path("/opt/torch/bin/python"), config, requests, 8, "float32") as peer:
        peer.run()  # new tokens per second
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.write_config import write_config
from tpu_stack.serving.requests import GenerationRequest

SCRIPT = Path(__file__).with_name("transformers_peer.py")


class TransformersPeer:
    """A process with a model of the shape of `config` and random weights, warmed up.

    Raises UserError where `python` does not run or lacks torch, or no architecture of
    `transformers` has this shape.

    Attributes:
      facts: JSON-ready; its name with versions, dtype, device, threads.
    """

    def __init__(
        self,
        python: Path,
        config: ModelConfig,
        requests: Sequence[GenerationRequest],
        batch: int,
        dtype: str,
    ):
        self._python, self._new = python, sum(r.max_tokens for r in requests)
        _, body = write_config(config)
        asked = [{"prompt": list(r.prompt), "new": r.max_tokens} for r in requests]
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name)
        (path / "config.json").write_text(json.dumps(body), encoding="utf-8")
        (path / "requests.json").write_text(json.dumps(asked), encoding="utf-8")
        self._said = (path / "stderr").open("w+", encoding="utf-8")
        try:
            self._process = subprocess.Popen(
                [str(python), str(SCRIPT), str(path), str(path / "requests.json"),
                 "--batch", str(batch), "--dtype", dtype],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            )  # fmt: skip
        except OSError as error:
            self._clean()
            raise UserError(f"--peer-python {python}: {error.strerror}") from error
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self) -> float:
        """New tokens per second of all requests, in batches; what rows past their end take counts
        for nothing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of a dead one the last words are told below
            print("run", file=self._process.stdin, flush=True)
        return self._new / self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._said.seek(0)
        last = (self._said.read().strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the transformers peer under {self._python} failed: {last}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._clean()

    def _clean(self) -> None:
        self._said.close()
        self._folder.cleanup()

    def __enter__(self) -> "TransformersPeer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
