"""Parameters as a Hugging Face folder: the exact inverse of `load.py`, one tensor at a time.

Example:
    write_weights(out, family, config, params, dtypes={})
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpu_stack.models.abstract import tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.families import Family
from tpu_stack.models.hf.folder import INDEX
from tpu_stack.models.hf.names import Piece, pieces
from tpu_stack.models.hf.safetensors_file import DTYPES, write_file

FILE_BYTES = 5 * 10**9
"""A weights file is closed before it would grow past this, as in Hugging Face's own folders."""

Listener = Callable[[str], None]


def write_weights(
    out: Path,
    family: Family,
    config: ModelConfig,
    params: Mapping[str, Any],
    dtypes: Mapping[str, str],
    default: str = "F32",
    listener: Listener = lambda name: None,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Writes the safetensors files, and their index where there are several; returns the bytes.

    `dtypes` says by Hugging Face name how a tensor is stored ("BF16", "F16", "F32", "F64"), and
    `default` how the others are. Values are rounded to nearest.
    """

    def dtype_of(piece: Piece) -> str:
        return dtypes.get(piece.source, default)

    def nbytes(piece: Piece) -> int:
        return prod(piece.shape) * DTYPES[dtype_of(piece)].itemsize

    files: list[list[Piece]] = [[]]
    for piece in sorted(pieces(family, config), key=lambda piece: piece.source):
        if files[-1] and sum(map(nbytes, files[-1])) + nbytes(piece) > file_bytes:
            files.append([])
        files[-1].append(piece)

    def arrays(held: list[Piece]) -> Iterator[tuple[str, np.ndarray]]:
        for piece in held:
            array = _host(tensor_of(params, piece.target), piece)
            yield piece.source, array.astype(DTYPES[dtype_of(piece)])
            listener(piece.source)

    places: dict[str, str] = {}
    for number, held in enumerate(files, 1):
        single = len(files) == 1
        name = "model" + ("" if single else f"-{number:05d}-of-{len(files):05d}") + ".safetensors"
        described = {piece.source: (dtype_of(piece), piece.shape) for piece in held}
        write_file(out / name, described, arrays(held))
        places.update(dict.fromkeys(described, name))
    total = sum(nbytes(piece) for held in files for piece in held)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _host(stacked: jax.Array, piece: Piece) -> np.ndarray:
    part = _part(stacked, tuple(map(np.int32, piece.index))) if piece.index else stacked
    array = np.asarray(jax.device_get(part))
    return array.T if piece.transposed else array


@jax.jit
def _part(stacked: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    return stacked[index]
