"""How much one client may ask for: every bound of the server in one place.

>>> Limits(body_bytes=1 << 20).check()
"""

from dataclasses import dataclass, fields

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds; the queue's is the engine's own, which answers QueueFull.

    A prompt's is the model's window, and what a client asks for must fit beside it.
    """

    body_bytes: int = 4 * 2**20
    """Bytes of a request's body; more is answered 413."""
    output_tokens: int = 65536
    """Tokens that one choice may have."""
    choices: int = 128
    """Prompts times n of one request."""
    pending_tokens: int = 4096
    """Tokens of a choice that may wait for a reader; a slower one's request is cancelled."""
    stall_s: float = 60.0
    """Seconds that a client may send no end of its headers or body, or take nothing of its
    answer."""

    def check(self) -> None:
        """Raises UserError for a bound that is not positive."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                flag = field.name.replace("_", "-")
                raise UserError(f"--limits.{flag} is {value}; it must be positive")
