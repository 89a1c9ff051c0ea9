"""`ts.evaluate`: validation loss, perplexity and bits per byte of a bundle or a checkpoint.

Example:
    evaluate("runs/a-int4", data=["plays.txt"])["perplexity"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tpu_stack.api.settings import as_paths
from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.pipeline import DataConfig, eval_batches, load_corpus
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.serving.bundle import Bundle
from tpu_stack.serving.layout import bytes_per_device, with_groups
from tpu_stack.serving.manifest import MANIFEST
from tpu_stack.serving.pack import restore_for_serving
from tpu_stack.sharding.constrain import sharding_scope
from tpu_stack.sharding.mesh import batch_sharding
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place
from tpu_stack.sharding.profiles import Profile, require_batch_divides
from tpu_stack.training.evaluate import Evaluator


def evaluate(
    target: str | Path,
    *,
    data: str | Path | Sequence[str | Path] = (),
    text: DataConfig = DataConfig(tokenizer="bpe:2048"),  # noqa: B008
    profile: str = "8i",
    compute_dtype: str = "bfloat16",
    where: PlacementOptions = PlacementOptions(),  # noqa: B008
) -> dict[str, Any]:
    """The evaluation of the validation split, in JSON-ready fields.

    The split is the one that training held out when `data` and `text` are the same.

    Args:
      target: a bundle, or a run folder, whose newest checkpoint is evaluated.
      text: the split, and `seq_len` and `batch_size` of the rows.
      profile: serving profile, NAME[:TOPOLOGY]. compute_dtype: bfloat16 or float32.

    Raises UserError for bad input of any of them.
    """
    if compute_dtype not in ("bfloat16", "float32"):
        raise UserError(f"compute_dtype is {compute_dtype!r}; bfloat16 or float32 would do")
    devices_for(profile, "serve", where)  # opening a checkpoint starts JAX
    source = open_target(Path(target))
    text = replace(text, paths=as_paths(data) or text.paths)
    placed, mesh = place(profile, "serve", where, with_groups(source.config, source.format))
    require_batch_divides(placed, text.batch_size)
    corpus = load_corpus(text, source.tokenizer)
    params = source.load(placed, mesh)
    batch = batch_sharding(placed.rules, mesh)
    evaluator = Evaluator(source.config, dtype=compute_dtype, batch=batch)
    with sharding_scope(mesh, placed.rules):
        found = evaluator.run(params, eval_batches(corpus, text), corpus.val)
    return {
        "target": str(target),
        "format": source.format,
        "profile": placed.name,
        "mesh": dict(placed.mesh),
        "bytes_per_device": bytes_per_device(source.config, source.format, placed),
        **found.to_dict(),
    }


@dataclass(frozen=True)
class Target:
    """A bundle, or a checkpoint of a run folder: what can be evaluated.

    Attributes:
      step: of the checkpoint; None for a bundle, whose weights are frozen.
    """

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    format: str
    step: int | None = None

    def load(self, profile: Profile, mesh: Mesh) -> dict[str, Any]:
        """The parameters on `mesh`, stacked over layers."""
        if self.step is None:
            return Bundle.open(self.path).load(profile, mesh)
        with CheckpointStore(self.path, read_only=True) as store:
            return restore_for_serving(store, self.step, self.config, profile, mesh)


def open_target(path: Path) -> Target:
    """A bundle, or the newest checkpoint of a run folder. Raises UserError for anything else."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a bundle or a run folder")
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        return Target(path, bundle.config, bundle.tokenizer, bundle.manifest.format)
    if not (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is neither a bundle (manifest.json) nor a run folder (checkpoints/)"
        )
    with CheckpointStore(path, read_only=True) as store:
        step = store.latest()
        meta = store.meta(step)
    config = ModelConfig.from_dict(meta["model"])
    tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {path}")
    return Target(path, config, tokenizer, "float32", step)
