"""Names that a caller may give, and one clear line for a name that is none of them.

check_names("train", {"step": 3}, ["steps", "seed"])  # UserError: did you mean steps?
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from tpu_stack.errors import UserError


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for the first of `given` that is not `known`, with the nearest that is."""
    names = list(known)
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise UserError(f"{what} has no setting {name!r}; {hint}")


def as_paths(paths: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """One path, or several, as text."""
    return (str(paths),) if isinstance(paths, str | Path) else tuple(map(str, paths))
