"""How much each program is asked to do: batches and lengths, with defaults that fit a profile.

>>> config = get_preset("llama3_8b")
>>> Workload.of(config, get_profile("8t:4x4x4"), get_profile("8i:8")).batch_size
128
"""

from dataclasses import dataclass
from fractions import Fraction

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.planner.tensors import shard_count
from tpu_stack.serving.engine.build import CHUNKS, PROMPTS
from tpu_stack.sharding.axes import BATCH
from tpu_stack.sharding.profiles import Profile, require_batch_divides

TOKENS_PER_DEVICE = 8192
ROWS_PER_SHARD = 16


@dataclass(frozen=True)
class PrefillStep:
    """One run of the engine's prefill program, which takes a chunk of each of a few prompts.

    Attributes:
      prompt: tokens of each prompt. rows: prompts of the program. chunk: tokens of each that it
        runs; a prompt's last chunk is padded up to that.
      filled: rows that there are prompts for, when all slots have one.
    """

    prompt: int
    rows: int
    chunk: int
    filled: int

    @classmethod
    def of(cls, prompt: int, slots: int) -> "PrefillStep":
        """For prompts of `prompt` tokens on an engine of `slots`: the most rows that an engine has
        a program for, in the narrowest chunk that holds a prompt, else the widest."""
        chunk = next((chunk for chunk in CHUNKS if chunk >= prompt), CHUNKS[-1])
        return cls(prompt, PROMPTS[-1], chunk, min(slots, PROMPTS[-1]))

    @property
    def tokens(self) -> int:
        """Prompt tokens that a run of full chunks takes."""
        return self.filled * min(self.chunk, self.prompt)

    @property
    def ends(self) -> tuple[int, ...]:
        """How many tokens of a prompt are in the cache after each of its chunks."""
        starts = range(0, self.prompt, self.chunk)
        return tuple(min(start + self.chunk, self.prompt) for start in starts)

    @property
    def positions(self) -> Fraction:
        """Positions of the cache that the queries of a chunk see, the mean over a prompt's."""
        return Fraction(sum(self.ends), len(self.ends))


@dataclass(frozen=True)
class Workload:
    """Sequences and tokens of the three programs, over all devices.

    Attributes:
      batch_size, seq_len: sequences of a train step, tokens of each.
      serve_batch: rows decoded together. context: positions the cache holds per row, all of which
        a decode step reads. prompt: tokens of each prompt that prefill runs, a chunk at a time.
    """

    batch_size: int
    seq_len: int
    serve_batch: int
    context: int
    prompt: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        train: Profile,
        serve: Profile,
        *,
        batch_size: int | None = None,
        seq_len: int | None = None,
        serve_batch: int | None = None,
        context: int | None = None,
        prompt: int | None = None,
    ) -> "Workload":
        """Fills in what is not given: 8192 training tokens a device in sequences of 4096, 16 rows
        for each engine, a context of 4096 and a prompt of 1024, each cut to the model's window.

        Raises UserError for a value out of range or a batch that the mesh does not divide.
        """
        given = {
            "batch_size": batch_size, "seq_len": seq_len, "serve_batch": serve_batch,
            "context": context, "prompt": prompt,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        seq_len = seq_len or min(4096, config.max_seq_len)
        context = context or min(4096, config.max_seq_len)
        prompt = prompt or max(1, min(1024, context // 2))
        for name, value in (("seq_len", seq_len), ("context", context)):
            if value > config.max_seq_len:
                raise UserError(
                    f"{name} is {value}; the model is meant for at most {config.max_seq_len} tokens"
                )
        if prompt >= context:
            raise UserError(f"prompt {prompt} leaves no room in context {context}")
        train_shards = shard_count(train, BATCH)
        wanted = TOKENS_PER_DEVICE * train.devices // seq_len
        batch_size = batch_size or max(1, wanted // train_shards) * train_shards
        serve_batch = serve_batch or ROWS_PER_SHARD * shard_count(serve, BATCH)
        require_batch_divides(train, batch_size)
        require_batch_divides(serve, serve_batch)
        return cls(batch_size, seq_len, serve_batch, context, prompt)

    def prefill_step(self, serve: Profile) -> PrefillStep:
        """What each replica's prefill program runs at a time."""
        return PrefillStep.of(self.prompt, self.serve_batch // shard_count(serve, BATCH))
