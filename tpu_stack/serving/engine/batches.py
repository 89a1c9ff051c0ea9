"""Host arrays for the programs, from sequences: one chunk of prompts, rows that take slots.

Example:
    batch, arrays = next_chunk(sequences, tables, shapes)
    programs.prefill(params, *arrays)
"""

from typing import NamedTuple

import numpy as np

from tpu_stack.serving.engine.sequence import Sequence
from tpu_stack.serving.engine.shapes import Shapes
from tpu_stack.serving.engine.state import InsertRows, insert_rows_of


class Chunk(NamedTuple):
    """What a prefill program takes; a row of length 0 is unused.

    tokens: [R, C]. starts, lengths: [R], position of the first token, and how many. tables: [R, M].
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray


def next_chunk(
    sequences: list[Sequence], tables: np.ndarray, shapes: Shapes
) -> tuple[list[Sequence], Chunk]:
    """The next tokens of the first of `sequences`, and of others that need a program as wide."""
    width = _width(sequences[0], shapes)
    batch = [s for s in sequences if _width(s, shapes) == width][: max(shapes.rows)]
    rows = min(rows for rows in shapes.rows if rows >= len(batch))
    chunk = Chunk(
        np.zeros((rows, width), np.int32),
        np.zeros(rows, np.int32),
        np.zeros(rows, np.int32),
        np.zeros((rows, shapes.entries), np.int32),
    )
    for row, sequence in enumerate(batch):
        part = sequence.request.prompt[sequence.computed : sequence.computed + width]
        chunk.tokens[row, : len(part)], chunk.lengths[row] = part, len(part)
        chunk.starts[row], chunk.tables[row] = sequence.computed, tables[sequence.slot]
    return batch, chunk


def targets_of(batch: list[Sequence], chunk: Chunk) -> np.ndarray:
    """[R, C], the token after each of a chunk's, to be scored; 0 after the prompt's last."""
    targets = np.zeros_like(chunk.tokens)
    for row, sequence in enumerate(batch):
        first = chunk.starts[row] + 1
        part = sequence.request.prompt[first : first + chunk.lengths[row]]
        targets[row, : len(part)] = part
    return targets


def _width(sequence: Sequence, shapes: Shapes) -> int:
    """The narrowest program that takes the rest of a prompt, or the widest there is."""
    left = len(sequence.request.prompt) - sequence.computed
    return next((chunk for chunk in shapes.chunks if chunk >= left), shapes.chunks[-1])


def rows_to_insert(
    sequences: list[Sequence | None], rows: int, vocab: int, shapes: Shapes
) -> InsertRows:
    """Rows for sequences that begin to decode; None, or one without a slot, takes none."""
    entries = [
        (shapes.slots, [0], 1, None)
        if s is None or s.slot is None
        else (s.slot, s.tokens, len(s.request.prompt), s.request.sampling)
        for s in sequences
    ]
    return insert_rows_of(shapes.slots, shapes.length, vocab, rows, entries)
