"""How large an engine is built: what the command line offers and `paged.build` reads.

>>> build_service(bundle, profile, mesh, EngineOptions(slots=16))
"""

from dataclasses import dataclass, fields

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class EngineOptions:
    """An engine's size; None leaves the choice to the engine."""

    slots: int = 8
    """Requests that decode at once."""
    queue: int = 256
    """Requests that may wait; beyond that they are answered 429."""
    max_length: int | None = None
    """Prompt and output tokens of one request; the default is the model's window."""

    page: int | None = None
    """Tokens of a page of the key/value cache, a multiple of 16."""
    pages: int | None = None
    """Pages of the cache; the default gives every slot a whole window."""
    guesses: int = 0
    """Tokens guessed per step from the text so far; the output stays the same. 0 guesses none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < (field.name != "guesses"):
                flag = field.name.replace("_", "-")
                raise UserError(
                    f"--{flag} is {value}; it must be at least {field.name != 'guesses':d}"
                )
        if self.page is not None and self.page % 16:
            raise UserError(f"--page is {self.page}; it must be a multiple of 16")
