"""What a checkpoint says about its run, and continuing that run bit for bit.

>>> state = restore_state(config, train, data, corpus, layout, store, batches)
"""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.data.pipeline import Corpus, DataConfig
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.training.config import TrainConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.step import TrainState


def _fingerprint(
    config: ModelConfig, train: TrainConfig, data: DataConfig, corpus: Corpus
) -> dict[str, Any]:
    """Everything that decides the sequence of states, as flat JSON-ready fields."""
    text = {"tokenizer": corpus.tokenizer.digest(), "train_tokens": len(corpus.train)}
    groups = {
        "model": config.to_dict(),
        "train": train.trajectory(),
        "data": asdict(data),
        "corpus": text,
    }
    return _flat(groups)


def _flat(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    flat = {f"{group}.{name}": value for group, d in groups.items() for name, value in d.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}


def checkpoint_meta(
    config: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    corpus: Corpus,
    state: TrainState,
    batches: Any,
) -> dict[str, Any]:
    """The JSON-ready meta item of a checkpoint; `model` and `tokenizer` make it stand alone."""
    return {
        "model": config.to_dict(),
        "tokenizer": corpus.tokenizer.to_json(),
        "run": _fingerprint(config, train, data, corpus),
        "iterator": batches.get_state(),
        "key": np.asarray(jax.random.key_data(state.key)).tolist(),
    }


def restore_state(
    config: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
    corpus: Corpus,
    layout: StateLayout,
    store: CheckpointStore,
    batches: Any,
) -> TrainState:
    """The newest state of `store`, in `layout`; sets `batches` to where that run stood.

    Raises UserError naming the first setting in which this run differs from the checkpoint's.
    """
    step = store.latest()
    meta = store.meta(step)
    if "iterator" not in meta:
        raise UserError(f"cannot resume {store.run}: it was imported, and holds parameters only")
    # Fields of the model that came after the checkpoint are what they were without being told.
    model = ModelConfig.from_dict(meta["model"]).to_dict()
    said = meta["run"] | _flat({"model": model})
    for name, now in _fingerprint(config, train, data, corpus).items():
        before = said.get(name)
        if before != now:
            raise UserError(f"cannot resume {store.run}: {name} was {before!r} and is now {now!r}")
    batches.set_state(meta["iterator"])
    replicated = layout.abstract.step.sharding
    key = jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))
    return TrainState(
        jax.device_put(jnp.int32(step), replicated),
        store.restore(step, "params", layout.abstract.params),
        store.restore(step, "optimizer", layout.abstract.opt_state),
        jax.device_put(key, replicated),
    )
