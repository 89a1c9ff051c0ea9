"""Prefill and decode, compiled at fixed shapes under a serving mesh.

`prefill_step` and `decode_step` are pure; the engine holds their compiled forms, the packed
parameters and the mesh. Prompts are padded to a bucket length, so a handful of prefill programs and
one decode program serve every request.

>>> engine = Engine(config, params, profile, mesh, batch=8, length=512)
>>> state = engine.prefill(prompts, sampling)
>>> state = engine.decode(state)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_stack.errors import UserError
from tpu_stack.models.cache import CACHE_AXES, Cache, cache_shape
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.decoder import Params, bind
from tpu_stack.serving.sampler import Sampling, sample
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.constrain import constrain, sharding_scope
from tpu_stack.sharding.profiles import Profile, require_batch_divides

BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What one decoding batch carries between steps.

    Attributes:
      cache: keys and values so far. sampling: per-row parameters.
      tokens: [B], the last token of each row, not yet in the cache.
      positions: [B], where `tokens` stand in their sequences.
    """

    cache: Cache
    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    sampling: Sampling


def prefill_step(
    config: ModelConfig,
    dtype: Any,
    params: Params,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    sampling: Sampling,
) -> DecodeState:
    """Runs right-padded prompts from position 0 and samples each row's first new token.

    What padding writes to the cache lies beyond the row's position and is overwritten before any
    query can see it.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    model = bind(config, params)
    outputs = model.hidden(tokens_BT, positions_BT, cache=cache, dtype=dtype)
    assert outputs.cache is not None
    last_BD = jnp.take_along_axis(outputs.hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    tokens_B = sample(_whole_rows(model.logits(last_BD)), sampling, lengths_B)
    return DecodeState(outputs.cache, tokens_B, lengths_B, sampling)


def decode_step(config: ModelConfig, dtype: Any, params: Params, state: DecodeState) -> DecodeState:
    """Feeds every row's last token and samples the next one."""
    model = bind(config, params)
    outputs = model.hidden(
        state.tokens[:, None], state.positions[:, None], cache=state.cache, dtype=dtype
    )
    assert outputs.cache is not None
    logits_BV = _whole_rows(model.logits(outputs.hidden[:, 0]))
    tokens_B = sample(logits_BV, state.sampling, state.positions + 1)
    return replace(state, cache=outputs.cache, tokens=tokens_B, positions=state.positions + 1)


def _whole_rows(logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits with each row on one device: sampling sorts rows, which a split vocabulary would
    turn into one exchange per comparison."""
    return constrain(logits_BV, BATCH, None)


def cache_sharding(profile: Profile, mesh: Mesh) -> NamedSharding:
    """How the cache is laid out: rows over the batch axes, heads over the tensor axis."""
    return NamedSharding(mesh, profile.rules.partition_spec(CACHE_AXES, "cache"))


class Engine:
    """Packed parameters and compiled programs for one batch size and one cache length."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        profile: Profile,
        mesh: Mesh,
        *,
        batch: int,
        length: int,
    ):
        require_batch_divides(profile, batch)
        self.config, self.params, self.profile, self.mesh = config, params, profile, mesh
        self.batch, self.length = batch, length
        dtype = profile.precision.compute
        rows: Any = NamedSharding(mesh, profile.rules.partition_spec((BATCH,)))
        cache: Any = cache_sharding(profile, mesh)
        state = DecodeState(Cache(cache, cache), rows, rows, Sampling(rows, rows, rows, rows))
        self._rows = rows
        self._cache_sharding = cache
        self._prefill = jax.jit(
            partial(prefill_step, config, dtype), donate_argnums=1, out_shardings=state
        )
        self._decode = jax.jit(
            partial(decode_step, config, dtype), donate_argnums=1, out_shardings=state
        )

    def _empty_cache(self) -> Cache:
        shape = cache_shape(self.config, self.batch, self.length)
        zeros = partial(jnp.zeros, shape, self.profile.precision.cache, device=self._cache_sharding)
        return Cache(zeros(), zeros())

    def prefill(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> DecodeState:
        """The state after the prompts' first sampled token; missing rows are filled with row 0.

        Raises UserError for no prompt, too many, an empty one, or one that leaves no room.
        """
        tokens_BT, lengths_B = self._padded(prompts)
        tokens = jax.device_put(tokens_BT, self._row_sharding(2))
        lengths = jax.device_put(lengths_B, self._rows)
        sampling = jax.device_put(sampling, self._rows)
        with sharding_scope(self.mesh, self.profile.rules):
            return self._prefill(self.params, self._empty_cache(), tokens, lengths, sampling)

    def decode(self, state: DecodeState) -> DecodeState:
        """One more token for every row; `state` is consumed."""
        with sharding_scope(self.mesh, self.profile.rules):
            return self._decode(self.params, state)

    @property
    def programs(self) -> int:
        """Compiled programs so far: grows on a new bucket, never on a new request."""
        compiled = (self._prefill, self._decode)
        return sum(program._cache_size() for program in compiled)  # type: ignore[attr-defined]

    def _row_sharding(self, rank: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*self._rows.spec, *(None,) * (rank - 1)))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        if not 1 <= len(prompts) <= self.batch:
            raise UserError(f"{len(prompts)} prompts; this engine takes 1 to {self.batch}")
        longest = max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise UserError("a prompt is empty; it needs at least one token")
        if longest >= self.length:
            raise UserError(
                f"a prompt has {longest} tokens; at most {self.length - 1} leave room for one more"
            )
        bucket = next((size for size in BUCKETS if size >= longest), self.length)
        rows = [*prompts, *[prompts[0]] * (self.batch - len(prompts))]
        tokens_BT = np.zeros((self.batch, min(bucket, self.length)), np.int32)
        for row, prompt in enumerate(rows):
            tokens_BT[row, : len(prompt)] = prompt
        return tokens_BT, np.array([len(prompt) for prompt in rows], np.int32)
