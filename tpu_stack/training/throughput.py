"""Tokens per second, and MFU where the hardware underneath is a chip with known facts.

>>> with throughput: state, metrics = step(state, batch); loss = float(metrics["loss"])
>>> throughput.tokens_per_s
"""

import time
from types import TracebackType
from typing import Self

from jax.sharding import Mesh

from tpu_stack.hardware import chip_of_device_kind
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.flops import train_flops_per_token
from tpu_stack.sharding.profiles import Profile
from tpu_stack.training.config import TrainConfig


class Throughput:
    """Accumulates the time of steps, leaving out the first, which warms up.

    MFU counts the model's FLOPs, not the recomputed ones, against the bf16 peak of the chip that
    JAX says it runs on (Chowdhery et al. 2022, appendix B); on a CPU it is None.
    """

    def __init__(self, config: ModelConfig, profile: Profile, train: TrainConfig, mesh: Mesh):
        self._tokens_per_step = train.batch_size * train.seq_len
        self._flops_per_token = train_flops_per_token(config, train.seq_len)
        self._steps = 0
        self._seconds = 0.0
        self._started = 0.0
        chip = chip_of_device_kind(mesh.devices.flat[0].device_kind)
        self._peak = None
        if chip is not None and chip.bf16_flops_per_s is not None:
            chips = mesh.size / chip.devices(1)
            self._peak = chips * chip.bf16_flops_per_s.number

    @property
    def tokens_per_s(self) -> float | None:
        """Over all devices; None before the second step."""
        if self._steps < 2 or not self._seconds:
            return None
        return self._tokens_per_step * (self._steps - 1) / self._seconds

    @property
    def mfu(self) -> float | None:
        """Fraction of the bf16 peak, None where the chip is not known."""
        rate = self.tokens_per_s
        if rate is None or self._peak is None:
            return None
        return rate * self._flops_per_token / self._peak

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._steps += 1
        if self._steps > 1:
            self._seconds += time.perf_counter() - self._started
