"""How an engine is built: what the command line offers and `engine.build` reads.

Example:
    start_service(config, params, profile, mesh, EngineOptions(slots=16, cache_dtype="int8"))
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tpu_stack.errors import UserError
from tpu_stack.sharding.profiles import Profile

CACHE_DTYPES = {
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "int8": "int8",
    "float32": "float32",
}
"""What `--cache-dtype` offers -> JAX's name."""
_AT_LEAST = {"slots": 1, "queue": 1, "max_length": 1, "page": 1, "pages": 1, "guesses": 0}


@dataclass(frozen=True)
class EngineOptions:
    """An engine's size and precision; None leaves the choice to the engine or the profile."""

    slots: int = 8
    """Requests that decode at once, over all replicas."""
    queue: int = 256
    """Requests that may wait, over all replicas; beyond that they are answered 429."""
    max_length: int | None = None
    """Prompt and output tokens of one request; the default is the model's window."""

    page: int | None = None
    """Tokens of a page of the key/value cache, a multiple of 16."""
    pages: int | None = None
    """Pages of the cache, over all replicas; the default gives every slot a whole window."""
    guesses: int = 0
    """Tokens guessed per step from the text so far; the output stays the same. 0 guesses none."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What activations are computed in; the default is the profile's, bfloat16."""
    cache_dtype: Literal["bf16", "fp8", "int8", "float32"] | None = None
    """What keys and values are stored as; int8 with a scale per token and head. The default is the
    profile's, bf16, or that of `dtype`."""

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if self.page is not None and self.page % 16:
            raise UserError(f"page is {self.page}; it must be a multiple of 16")

    def divided(self, replicas: int) -> "EngineOptions":
        """What each of so many engines gets of the slots, the queue and the pages, rounded up."""
        share = {name: getattr(self, name) for name in ("slots", "queue", "pages")}
        share = {name: -(-size // replicas) for name, size in share.items() if size is not None}
        return dataclasses.replace(self, **share)

    def applied(self, profile: Profile) -> Profile:
        """The profile with the precision that the options ask for."""
        chosen = {
            "compute": self.dtype,
            "cache": CACHE_DTYPES[self.cache_dtype] if self.cache_dtype else self.dtype,
        }
        chosen = {name: dtype for name, dtype in chosen.items() if dtype is not None}
        precision = dataclasses.replace(profile.precision, **chosen)
        return dataclasses.replace(profile, precision=precision)
