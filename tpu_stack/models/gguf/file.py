"""A GGUF file opened: metadata as Python values, tensors as float32 arrays when they are read.

file = GgufFile.open(Path("model.gguf"))
file.metadata["general.architecture"]  # 'llama'
file.tensors["output_norm.weight"].read().shape  # (576,)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpu_stack.errors import UserError


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
      name: GGUF's. type: how it is stored, such as "Q4_1". shape: outermost axis first, as numpy's.
      data: the file's bytes, mapped into memory.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray

    def read(self, index: tuple[int, ...] = ()) -> np.ndarray:
        """The tensor, or one of its outermost parts, in float32.

        Every supported type is exact in float32. Raises UserError for a type without a decoder.
        """
        import gguf

        part = self.data[index]
        try:
            return gguf.dequantize(part, gguf.GGMLQuantizationType[self.type]).reshape(
                self.shape[len(index) :]
            )
        except NotImplementedError as error:
            raise UserError(f"tensor {self.name} is {self.type}, which is not read here") from error


@dataclass(frozen=True)
class GgufFile:
    """`metadata` holds numbers, strings, booleans and lists of them by GGUF key."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Reads the metadata and where each tensor lies.

        Raises UserError for a file that is missing, damaged, cut short or no GGUF, and where the
        `gguf` package is not installed.
        """
        try:
            import gguf
        except ImportError as error:
            raise UserError(
                f"{path}: reading GGUF needs the gguf package; pip install 'tpu-stack[gguf]'"
            ) from error
        try:
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise UserError(f"{path} is not a GGUF file")
            reader = gguf.GGUFReader(path)
            metadata = {
                name: field.contents()
                for name, field in reader.fields.items()
                if not name.startswith("GGUF.")
            }
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, IndexError, KeyError, TypeError) as error:  # whatever numpy met in it
            raise UserError(f"{path} is damaged or cut short: {error}") from error
        tensors = {
            tensor.name: GgufTensor(
                tensor.name,
                tensor.tensor_type.name,
                tuple(int(size) for size in reversed(tensor.shape)),
                tensor.data,
            )
            for tensor in reader.tensors
        }
        return cls(path, metadata, tensors)
