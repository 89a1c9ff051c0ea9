"""`tpu-stack eval`: validation loss, perplexity and bits per byte of a bundle or a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.cli.text import TextOptions, data_config
from tpu_stack.sharding.placement import PlacementOptions


@dataclass(frozen=True)
class Options:
    """Evaluate a bundle, or a run folder's newest checkpoint, on the validation split of a text.

    With the --data and --text.* of training, that is the split that training held out.

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
    """The evaluation, JSON-ready; see `api.evaluate`."""
    from tpu_stack.api import evaluation

    text = data_config((), options.text, seq_len=options.seq_len, batch_size=options.batch_size)
    return evaluation.evaluate(
        options.target,
        data=options.data,
        text=text,
        profile=options.profile,
        compute_dtype=options.compute_dtype,
        where=options.place,
    )
