"""Specs and moves in words: the same in the tables of `tpu-stack compare` and on its page.

>>> spec_text([None, "fsdp", "tensor"], {"fsdp": 4, "tensor": 1})
'-, fsdp, (tensor)'
"""

from typing import Any


def spec_text(spec: list[Any], mesh: dict[str, int]) -> str:
    """Mesh axes per dimension; axes of size 1, which split nothing, in brackets."""

    def entry(names: Any) -> str:
        names = [names] if isinstance(names, str) else names or []
        return "+".join(n if mesh[n] > 1 else f"({n})" for n in names) or "-"

    return ", ".join(map(entry, spec))


def move_text(move: dict[str, Any], mesh: dict[str, int]) -> str:
    """ "all-gather fsdp 8 of 64": what moves, over which mesh axes, and how much of them."""
    if move["kind"] in ("slice", "send"):
        return f"{move['kind']} to {move['shards']}"
    axes, whole = move["axes"] or [], 1
    for axis in axes:
        whole *= mesh[axis]
    part = f" {move['shards']} of {whole}" if axes and whole != move["shards"] else ""
    return f"{move['kind']} {'+'.join(axes)}{part}".strip()
