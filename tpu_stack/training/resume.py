"""What a checkpoint says about its run, and continuing that run bit for bit.

A run may go on only with the settings that decided its states so far.

    settings = {"train.seed": 0, **batches.fingerprint()}
    store.save(trainer.step, {"params": params}, checkpoint_meta(trainer, settings))
    state = restore_state(store, layout, batches, settings)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.training.batches import Batches
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.step import TrainState
from tpu_stack.training.trainer import Trainer


def flat(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`{"group": {"name": value}}` as `{"group.name": value}`, tuples as JSON's lists."""
    fields = {f"{group}.{name}": value for group, d in groups.items() for name, value in d.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def checkpoint_meta(trainer: Trainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's meta item needs for `restore_state`; JSON-ready.

    `settings` are all that decides the sequence of states, the batches' fingerprint included.
    """
    return {
        "run": dict(settings),
        "iterator": trainer.position,
        "key": np.asarray(jax.random.key_data(trainer.state.key)).tolist(),
    }


def restore_state(
    store: CheckpointStore,
    layout: StateLayout,
    batches: Batches,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
) -> TrainState:
    """The newest state of `store`, in `layout`; sets `batches` to where that run stood.

    Args:
      settings: of this run, as `checkpoint_meta` had them of the one that saved.
      defaults: what settings that came after the checkpoint stood for before.

    Raises UserError naming the first setting in which this run differs from the checkpoint's.
    """
    step = store.latest()
    meta = store.meta(step)
    if "iterator" not in meta:
        raise UserError(f"cannot resume {store.run}: it was imported, and holds parameters only")
    said = {**(defaults or {}), **meta["run"]}
    for name, now in settings.items():
        before = said.get(name)
        if before != now:
            raise UserError(f"cannot resume {store.run}: {name} was {before!r} and is now {now!r}")
    batches.set_state(meta["iterator"])
    key = jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))
    state = TrainState.first(
        store.restore(step, "params", layout.abstract.params),
        store.restore(step, "optimizer", layout.abstract.opt_state),
        key,
        step,
    )
    return jax.device_put(state, layout.shardings)
