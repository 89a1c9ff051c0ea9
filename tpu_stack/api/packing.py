"""`ts.pack`: from a checkpoint to a frozen, packed, read-only bundle.

Example:
    bundle = pack("runs/a", "int4", out="runs/a-int4")
"""

from collections.abc import Callable
from pathlib import Path

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import get_format
from tpu_stack.serving.bundle import Bundle
from tpu_stack.serving.layout import with_groups
from tpu_stack.serving.pack import pack as write_packed
from tpu_stack.sharding.placement import PlacementOptions, devices_for, place


def pack(
    run: str | Path,
    format: str = "int4",
    *,
    out: str | Path,
    profile: str = "8i",
    step: int | None = None,
    rotation: int = 0,
    where: PlacementOptions = PlacementOptions(),  # noqa: B008
    listener: Callable[[str, int], None] = lambda name, count: None,
) -> Bundle:
    """Packs step `step` (default: the newest) of a run folder into the bundle `out`.

    Args:
      format: a weight format. rotation: as in `serving.pack.pack`.
      profile: serving profile, NAME[:TOPOLOGY]. where: a mesh or a number of devices.
      listener: told the name of each tensor once it is packed, and how many there are.

    Raises UserError for bad input of any of them; `out` is written whole or not at all.
    """
    get_format(format)
    run, out = Path(run), Path(out)
    devices_for(profile, "serve", where)  # opening a checkpoint starts JAX
    with CheckpointStore(run, read_only=True) as store:
        step = store.latest() if step is None else step
        specs = with_groups(ModelConfig.from_dict(store.meta(step)["model"]), format)
    placed, mesh = place(profile, "serve", where, specs)

    def tell(name: str) -> None:
        listener(name, len(specs))

    write_packed(run, format, placed, mesh, out, step=step, rotation=rotation, listener=tell)
    return Bundle.open(out)
