"""`tpu-stack eval`: validation loss, perplexity and bits per byte of a bundle or a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.cli.text import TextOptions, data_config
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place

if TYPE_CHECKING:
    from tpu_stack.data.tokenizer import Tokenizer
    from tpu_stack.models.config import ModelConfig


@dataclass(frozen=True)
class Options:
    """Evaluate a bundle, or a run folder's newest checkpoint, on the validation split of a text.

    The split is the one that training held out when --data and --text are the same.

    Example: tpu-stack eval runs/a-int4 --data plays.txt
    """

    target: Positional[Path]
    """A bundle, or the --out folder of `tpu-stack train`."""
    data: tuple[Path, ...] = ()
    """Files and folders of text; the default is Python's standard library."""
    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips."""
    seq_len: int = 256
    """Tokens in a row."""
    batch_size: int = 16
    """Rows evaluated at once."""
    compute_dtype: str = "bfloat16"
    """bfloat16 or float32."""
    json: Path | None = None
    """Also write the result to this file."""
    text: TextOptions = field(default_factory=TextOptions)
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Evaluates and prints the result."""
    result = evaluate(options)
    keys = ("format", "tokens", "loss", "perplexity", "bits_per_byte", "bytes_per_device")
    rows = [[key.replace("_", " "), _cell(result[key])] for key in keys]
    print_table(f"validation of {options.target}", ["what", "value"], rows)
    save_json(options.json, result)


def _cell(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float) else f"{value}"


def evaluate(options: Options) -> dict[str, Any]:
    """The evaluation in JSON-ready fields."""
    from tpu_stack.data.pipeline import eval_batches, load_corpus
    from tpu_stack.serving.layout import bytes_per_device, with_groups
    from tpu_stack.sharding.constrain import sharding_scope
    from tpu_stack.sharding.mesh import batch_sharding
    from tpu_stack.sharding.profiles import require_batch_divides
    from tpu_stack.training.evaluate import Evaluator

    if options.compute_dtype not in ("bfloat16", "float32"):
        raise UserError(
            f"--compute-dtype is {options.compute_dtype!r}; bfloat16 or float32 would do"
        )
    devices_for(options.profile, "serve", options.place)
    source = open_target(options.target)
    data = data_config(
        options.data, options.text, seq_len=options.seq_len, batch_size=options.batch_size
    )
    profile, mesh = place(
        options.profile, "serve", options.place, with_groups(source.config, source.format)
    )
    require_batch_divides(profile, options.batch_size)
    corpus = load_corpus(data, source.tokenizer)
    params = source.load(profile, mesh)
    batch = batch_sharding(profile.rules, mesh)
    evaluator = Evaluator(source.config, dtype=options.compute_dtype, batch=batch)
    with sharding_scope(mesh, profile.rules):
        found = evaluator.run(params, eval_batches(corpus, data), corpus.val)
    return {
        "target": str(options.target),
        "format": source.format,
        "profile": profile.name,
        "mesh": dict(profile.mesh),
        "bytes_per_device": bytes_per_device(source.config, source.format, profile),
        **found.to_dict(),
    }


@dataclass(frozen=True)
class Target:
    """What is evaluated, wherever it came from."""

    config: "ModelConfig"
    tokenizer: "Tokenizer"
    format: str
    load: Any


def open_target(path: Path) -> Target:
    """A bundle, or the newest checkpoint of a run folder. Raises UserError for anything else."""
    from tpu_stack.checkpoint.store import CheckpointStore
    from tpu_stack.data.tokenizer import Tokenizer
    from tpu_stack.models.config import ModelConfig
    from tpu_stack.serving.bundle import Bundle
    from tpu_stack.serving.manifest import MANIFEST
    from tpu_stack.serving.pack import restore_for_serving

    if not path.exists():
        raise UserError(f"{path} does not exist; give a bundle or a run folder")
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        return Target(bundle.config, bundle.tokenizer, bundle.manifest.format, bundle.load)
    if not (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is neither a bundle (manifest.json) nor a run folder (checkpoints/)"
        )
    with CheckpointStore(path, read_only=True) as store:
        step = store.latest()
        meta = store.meta(step)
    config = ModelConfig.from_dict(meta["model"])

    def load(profile, mesh):
        with CheckpointStore(path, read_only=True) as store:
            return restore_for_serving(store, step, config, profile, mesh)

    tokenizer = Tokenizer.from_json(meta["tokenizer"], where=f"the tokenizer of {path}")
    return Target(config, tokenizer, "float32", load)
