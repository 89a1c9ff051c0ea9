"""One choice out of the many that a search tries, and what the simulator makes of it.

plan.candidate.mesh, plan.tokens_per_s_per_chip  # ('fsdp=64', 7100.0)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpu_stack.planner.aot.spec import CompileSpec
from tpu_stack.quant.formats import get_format
from tpu_stack.sharding.mesh import mesh_text
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Candidate:
    """A program on a mesh with every choice made.

    Attributes:
      program: "train", "prefill" or "decode". profile: chips, mesh, and for training remat.
      batch: sequences over all devices. accumulate: micro-batches of a train step.
      format: what serving stores the weights as; "" for training.
      tokens: of a step over all devices. length: of a sequence, or positions of the cache.
    """

    program: str
    profile: Profile
    batch: int
    tokens: int
    length: int
    accumulate: int = 1
    format: str = ""

    @property
    def mesh(self) -> str:
        """Axes larger than 1, as in "fsdp=16,tensor=4"; "one device" where none is."""
        large = {axis: size for axis, size in self.profile.mesh.items() if size > 1}
        return mesh_text(large) if large else "one device"

    @property
    def choice(self) -> str:
        """What is chosen beside mesh and batch: remat and micro-batches, or the format."""
        if self.program != "train":
            return self.format
        split = f", {self.accumulate} micro-batches" if self.accumulate > 1 else ""
        return f"remat {self.profile.remat}{split}"

    @property
    def weight_bits(self) -> int:
        """Bits of a served weight; 0 for training."""
        return get_format(self.format).bits if self.format else 0

    @property
    def text(self) -> str:
        """The candidate in words."""
        return f"{self.profile.name}, {self.mesh}, batch {self.batch}, {self.choice}"

    def spec(self, model: str) -> CompileSpec:
        """The spec that `planner.aot` compiles of it."""
        mesh = mesh_text(self.profile.mesh)
        if self.program == "train":
            return CompileSpec(
                model, self.profile.name, "train", mesh, batch_size=self.batch,
                seq_len=self.length, accumulate=self.accumulate, remat=self.profile.remat,
            )  # fmt: skip
        prompt = self.tokens // self.batch if self.program == "prefill" else None
        return CompileSpec(
            model, self.profile.name, self.program, mesh, format=self.format,
            serve_batch=self.batch, context=self.length, prompt=prompt,
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A candidate that fits, simulated.

    Attributes:
      terms: seconds of a step by what they go to; they sum to `step_s`.
      memory: bytes a device holds, by term. capacity: bytes that a program may use of it.
      checked: whether `memory` is `planner.memory`'s word, rather than the search's quick count.
    """

    candidate: Candidate
    terms: Mapping[str, float]
    memory: Mapping[str, float]
    capacity: int
    checked: bool = False

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step: of a decoded token, or of a batch of prompts."""
        return sum(self.terms.values())

    @property
    def tokens_per_s(self) -> float:
        """Over all chips."""
        return self.candidate.tokens / self.step_s

    @property
    def chips(self) -> int:
        """Chips that it runs on."""
        return self.candidate.profile.chips or 1

    @property
    def tokens_per_s_per_chip(self) -> float:
        """Trained, read or decoded tokens."""
        return self.tokens_per_s / self.chips

    @cached_property
    def held_bytes(self) -> float:
        """What a device must hold."""
        return sum(self.memory.values())

    @property
    def headroom(self) -> float:
        """Share of a device's memory that stays free."""
        return 1 - self.held_bytes / self.capacity

    @property
    def usd_per_million_tokens(self) -> float | None:
        """At the chip's price on demand; None where no source gives one."""
        price = self.candidate.profile.chip_facts.price_usd_per_hour
        if price is None:
            return None
        return price.number * self.chips / 3600 / self.tokens_per_s * 1e6

    @property
    def longest_term(self) -> str:
        """What most of the step goes to."""
        return max(self.terms, key=lambda name: self.terms[name])

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, units in the keys."""
        candidate = self.candidate
        return {
            "profile": candidate.profile.name,
            "chips": self.chips,
            "mesh": dict(candidate.profile.mesh),
            "batch": candidate.batch,
            "accumulate": candidate.accumulate,
            "remat": candidate.profile.remat if candidate.program == "train" else None,
            "format": candidate.format or None,
            "step_s": self.step_s,
            "terms_s": dict(self.terms),
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_chip": self.tokens_per_s_per_chip,
            "usd_per_million_tokens": self.usd_per_million_tokens,
            "memory_bytes_per_device": dict(self.memory),
            "usable_bytes_per_device": self.capacity,
            "headroom": self.headroom,
            "memory_checked": self.checked,
        }
