"""Safetensors files one tensor at a time, read and written without holding a second.

The library's own writer wants all tensors of a file at once. The format is a length, a JSON header
and the bytes (https://github.com/huggingface/safetensors#format).

    entries = read_header(Path("model.safetensors"))
    entries["model.norm.weight"].read().shape  # (4096,)
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tpu_stack.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_ALIGNMENT = 8
_CPU_ALIGNMENT = 64
_LARGEST_HEADER = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; `offset` counts from the file's start."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray:
        """The tensor, in the dtype it is stored in. Raises UserError when it cannot be read."""
        array = _aligned(prod(self.shape), DTYPES[self.dtype])
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                got = file.readinto(array.view(np.uint8))
        except OSError as error:
            raise UserError(f"{self.file}: cannot read {self.name}: {error.strerror}") from error
        if got != array.nbytes:
            raise UserError(f"{self.file} ends within tensor {self.name}")
        return array.reshape(self.shape)


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that JAX takes on a CPU as it is, where it would copy others."""
    buffer = np.empty(size * dtype.itemsize + _CPU_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _CPU_ALIGNMENT
    return buffer[start : start + size * dtype.itemsize].view(dtype)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises UserError when the file is damaged or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, _LARGEST_HEADER):
                raise UserError(f"{path} is damaged: its header does not fit the file")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Any, data: int, size: int) -> StoredTensor:
    damaged = UserError(f"{path} is damaged: its header misdescribes tensor {name}")
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise damaged from error
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise damaged
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name} is {dtype}; supported: {', '.join(DTYPES)}")
    tensor = StoredTensor(path, name, dtype, shape, data + begin)
    if end - begin != tensor.nbytes or data + end > size:
        raise UserError(f"{path} is damaged: tensor {name} {list(shape)} does not fit its bytes")
    return tensor


def dtype_name(dtype: np.dtype) -> str:
    """The format's name of a numpy dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def write_file(
    path: Path,
    described: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes `tensors`, consumed one at a time, in the order of `described`: name -> dtype, shape.

    Raises ValueError when a tensor is not what was described.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        begin, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), (given, array) in zip(described.items(), tensors, strict=True):
            if (given, dtype_name(array.dtype), array.shape) != (name, dtype, tuple(shape)):
                raise ValueError(f"{given} {array.dtype}{array.shape} is not {name} {dtype}{shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
