"""`ts.open`: a bundle, a run folder or a trained state, behind a running engine.

Example:
    with open("runs/a-int4") as model:
        print(model.generate(["def ", "class "], max_tokens=32, temperature=0.8))
        group = model.rollout(["def "], samples=64, max_tokens=16, temperature=1.0)
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tpu_stack.api.settings import check_names
from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.errors import UserError
from tpu_stack.serving.client import Completions, Scores, rollout, score
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.serving.generate import GenerationStats, stream_text
from tpu_stack.serving.launch import Served, Weights, Where, start_engine
from tpu_stack.serving.manifest import MANIFEST
from tpu_stack.serving.requests import GenerationRequest, SamplingParams
from tpu_stack.serving.service import InFlight
from tpu_stack.sharding.placement import PlacementOptions, devices_for
from tpu_stack.training.run import TrainResult

Prompt = str | Sequence[int]
"""Text, or token ids."""


def open(
    source: str | Path | TrainResult,
    profile: str = "8i",
    *,
    format: str = "bf16",
    where: PlacementOptions = PlacementOptions(),  # noqa: B008
    engine: EngineOptions = EngineOptions(),  # noqa: B008
) -> "Model":
    """Starts an engine; it compiles each program when it is first needed.

    Args:
      source: a bundle; or a run folder or what `train` returned, whose parameters are packed to
        `format` in memory.
      profile: serving profile, NAME[:TOPOLOGY]. where: a mesh or a number of devices.
      engine: slots, pages, the longest request, dtypes.

    Raises UserError for a source that is none of these, and for sizes that do not fit.
    """
    if not isinstance(source, TrainResult):
        devices_for(profile, "serve", where)  # opening a checkpoint starts JAX
    weights = _weights(source, format)
    return Model(start_engine(weights, Where(profile, place=where), engine, warm_up=False))


def _weights(source: str | Path | TrainResult, format: str, rotation: int = 0) -> Weights:
    if isinstance(source, TrainResult):
        job = source.job
        params, tokenizer = source.state.params, job.corpus.tokenizer
        return Weights.of_params(job.config, params, format, tokenizer, rotation)
    path = Path(source)
    if (path / MANIFEST).is_file():
        return Weights.of(path)
    if (path / "checkpoints").is_dir():
        return Weights.of_run(path, format, rotation)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a bundle or a run folder")
    raise UserError(f"{path} is neither a bundle (manifest.json) nor a run folder (checkpoints/)")


def _sampling(settings: dict[str, Any]) -> SamplingParams:
    check_names("sampling", settings, [field.name for field in fields(SamplingParams)])
    return SamplingParams(**settings)


class Model:
    """A running engine with its tokenizer. Close it, or use it in a `with` statement."""

    def __init__(self, served: Served):
        self._served = served
        self.service = served.service
        assert served.weights.tokenizer is not None
        self.tokenizer = served.weights.tokenizer
        self.chat = served.weights.chat or ChatFormat()

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        stats: GenerationStats | None = None,
        **sampling: Any,
    ) -> Iterator[tuple[int, str]]:
        """(row, text) as rows grow; see `serving.generate.stream_text`. `sampling` are fields of
        `SamplingParams`, such as temperature=0.8."""
        params = _sampling(sampling)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return stream_text(
            self.service, self.tokenizer, prompts, params,
            max_tokens=max_tokens, chat=self.chat, stats=stats,
        )  # fmt: skip

    def generate(
        self, prompts: str | Sequence[str], *, max_tokens: int = 64, **sampling: Any
    ) -> Any:
        """The text after each prompt: a string for a string, a list for a list."""
        rows = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [""] * len(rows)
        for row, piece in self.stream(rows, max_tokens=max_tokens, **sampling):
            texts[row] += piece
        return texts[0] if isinstance(prompts, str) else texts

    def rollout(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 64, samples: int = 1, **sampling: Any
    ) -> Completions:
        """`samples` completions of every prompt, as arrays with both log-probabilities of each
        token and the generation of its weights; see `serving.client.rollout`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        params, ends = _sampling(sampling), frozenset(self.chat.ends(self.tokenizer))
        requests = [
            GenerationRequest(self.ids(prompt), max_tokens, params, ends) for prompt in prompts
        ]
        return rollout(self.service, requests, samples=samples)

    def score(self, sequences: Sequence[Prompt], *, start: int | Sequence[int] = 1) -> Scores:
        """The model's log-probabilities of given tokens; see `serving.client.score`."""
        sequences = [sequences] if isinstance(sequences, str) else sequences
        return score(self.service, [self.ids(each) for each in sequences], start=start)

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt; text begins as the model's chat format says."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        ids = (*self.chat.begin(self.tokenizer), *self.tokenizer.encode(prompt))
        if not ids:
            raise UserError("a prompt is empty; it needs at least one token")
        return ids

    def load(
        self, source: str | Path | TrainResult, in_flight: InFlight = "finish"
    ) -> "Future[int]":
        """Newer weights of the same model, packed to this one's format, between two steps; the
        future gives the generation that is then live. Raises UserError where they do not fit."""
        if in_flight not in ("finish", "restart"):
            raise UserError(f"in_flight is {in_flight!r}; requests in flight finish or restart")
        now = self._served.weights
        weights = _weights(source, now.format, now.rotation)
        return self._served.load(weights, in_flight)

    def close(self) -> None:
        """Ends the engine; requests in flight are cancelled."""
        self.service.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
