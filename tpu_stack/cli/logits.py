"""`tpu-stack logits`: a model's logits for given tokens, to compare with other software."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from tpu_stack.cli.console import print_table, progress, save_json
from tpu_stack.cli.placement import Unprefixed
from tpu_stack.errors import UserError
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place


@dataclass(frozen=True)
class Options:
    """Write the logits of a bundle, or of a run folder's newest checkpoint, for given token ids.

    Example: tpu-stack logits runs/qwen3 --tokens tokens.npz --out logits.npz
    """

    target: Positional[Path]
    """A bundle, or a run folder."""
    tokens: Path
    """An .npz file with an integer array `tokens` [B, T]."""
    out: Path
    """The .npz file to write: float32 `logits` [B, T, V]."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products."""
    batch_size: int = 8
    """Rows computed at once."""
    profile: str = "8i"
    """Serving profile, NAME[:TOPOLOGY]; counts chips."""
    json: Path | None = None
    """Also write the result to this file."""
    place: Annotated[PlacementOptions, Unprefixed] = field(default_factory=PlacementOptions)


def run(options: Options) -> None:
    """Writes the logits and prints a summary."""
    result = write_logits(options)
    rows = [[key.replace("_", " "), value] for key, value in result.items()]
    print_table(f"logits of {options.target}", ["what", "value"], rows)
    save_json(options.json, result)


def write_logits(options: Options) -> dict[str, Any]:
    """Writes float32 `logits` [B, T, V] to `out`; returns a summary, JSON-ready."""
    import jax
    import numpy as np

    from tpu_stack.api.evaluation import open_target
    from tpu_stack.files import replacing_file
    from tpu_stack.models.decoder import forward
    from tpu_stack.serving.layout import with_groups
    from tpu_stack.sharding.constrain import sharding_scope
    from tpu_stack.sharding.mesh import batch_sharding

    if options.batch_size < 1:
        raise UserError(f"--batch-size is {options.batch_size}; it must be at least 1")
    devices_for(options.profile, "serve", options.place)
    source = open_target(options.target)
    tokens = read_tokens(options.tokens, source.config.vocab_size)
    specs = with_groups(source.config, source.format)
    profile, mesh = place(options.profile, "serve", options.place, specs)
    params = source.load(profile, mesh)
    rows = -(-min(options.batch_size, len(tokens)) // profile.mesh["data"]) * profile.mesh["data"]
    padded = np.pad(tokens, ((0, -len(tokens) % rows), (0, 0)))
    sharding = batch_sharding(profile.rules, mesh)
    compute = jax.jit(
        lambda params, ids: forward(source.config, params, ids, dtype=options.compute_dtype)
    )
    parts = []
    with sharding_scope(mesh, profile.rules), progress() as bar:
        task = bar.add_task("logits", total=len(padded), note="")
        for start in range(0, len(padded), rows):
            ids = jax.device_put(padded[start : start + rows], sharding)
            parts.append(np.asarray(compute(params, ids), np.float32))
            bar.update(task, advance=rows)
    logits = np.concatenate(parts)[: len(tokens)]
    with replacing_file(options.out) as partial, partial.open("wb") as file:
        np.savez(file, logits=logits)
    return {
        "out": str(options.out),
        "format": source.format,
        "compute_dtype": options.compute_dtype,
        "shape": list(logits.shape),
        "largest": float(np.abs(logits).max()),
    }


def read_tokens(path: Path, vocab_size: int) -> Any:
    """`tokens` of an .npz file, int32 [B, T]. Raises UserError for another array or a bad id."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as held:
            tokens = held["tokens"]
    except KeyError as error:
        raise UserError(f"{path} has no array `tokens`") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, AttributeError, TypeError, EOFError) as error:
        raise UserError(f"{path} is not an .npz file") from error
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"{path}: tokens is {tokens.dtype} {list(tokens.shape)}; it must be integers [B, T]"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise UserError(
            f"{path}: tokens lie in {tokens.min()} to {tokens.max()}; the model's ids are 0 to"
            f" {vocab_size - 1}"
        )
    return tokens.astype(np.int32)
