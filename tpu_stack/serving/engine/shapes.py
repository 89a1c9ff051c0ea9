"""The shapes that an engine's programs are compiled for: every one it will ever run.

>>> Shapes(slots=8, length=2048, page=16, pages=1024, chunks=(64, 256), rows=(1, 4)).entries
128
"""

from dataclasses import dataclass

from tpu_stack.serving.requests import GenerationRequest


@dataclass(frozen=True)
class Shapes:
    """What programs are compiled for.

    Attributes:
      slots: B. length: S, a multiple of page. page: tokens of a page. pages: P.
      chunks: prompt tokens per row of a prefill program; tails are padded up to one of them.
      rows: prompts per prefill program, 1 among them. guesses: tokens guessed per step, 0 for none.
    """

    slots: int
    length: int
    page: int
    pages: int
    chunks: tuple[int, ...]
    rows: tuple[int, ...]
    guesses: int = 0

    @property
    def entries(self) -> int:
        """Pages of the longest sequence."""
        return self.length // self.page

    def limit_of(self, request: GenerationRequest) -> int:
        """Tokens, prompt included, at which a request is at its end."""
        return min(len(request.prompt) + request.max_tokens, self.length)
