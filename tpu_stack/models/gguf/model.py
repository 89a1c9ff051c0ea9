"""A GGUF model as `hf.load_params` reads one: which of its tensors is which piece.

model = GgufModel.open(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
model.config.n_layers  # 30
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.gguf.file import GgufFile, GgufTensor
from tpu_stack.models.gguf.metadata import ROPE_FACTORS, config_of
from tpu_stack.models.hf.families import Family
from tpu_stack.models.hf.folder import listed
from tpu_stack.models.hf.names import Piece, pieces
from tpu_stack.models.hf.read_config import read_config

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_INTERLEAVED = re.compile(r"\.attn_[qk]\.weight$")


@dataclass(frozen=True)
class GgufModel:
    """An opened file. Invariant: `sources` has one tensor of the right shape per piece.

    Attributes:
      sources: a piece's Hugging Face name -> its tensor, and the part of it for an expert.
    """

    path: Path
    file: GgufFile
    family: Family
    config: ModelConfig
    sources: Mapping[str, tuple[GgufTensor, tuple[int, ...]]]
    left_out: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "GgufModel":
        """Reads metadata and headers, and compares every shape with what the model needs.

        Raises UserError for a file that is none, an architecture that is not known, and tensors
        that are missing, left over or of another shape.
        """
        file = GgufFile.open(path)
        family, config = read_config(config_of(file), f"the metadata of {path}")
        wanted = list(pieces(family, config))
        sources = _sources(file, wanted, config)
        _compare(file, wanted, sources)
        return cls(path, file, family, config, sources)

    def pieces(self) -> list[Piece]:
        """What goes where."""
        return list(pieces(self.family, self.config))

    def read(self, piece: Piece) -> np.ndarray:
        """A piece as it is stored here, [in, out], float32."""
        tensor, index = self.sources[piece.source]
        array = tensor.read(index)
        if self.file.metadata["general.architecture"] == "llama" and _INTERLEAVED.search(
            tensor.name
        ):
            array = _halves(array, self.config.head_dim)
        return array.T if piece.transposed else array

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors the file stores in each type."""
        return dict(Counter(tensor.type for tensor in self.file.tensors.values()))


def _sources(
    file: GgufFile, wanted: list[Piece], config: ModelConfig
) -> dict[str, tuple[GgufTensor, tuple[int, ...]]]:
    """The tensor of each piece, by the `gguf` package's own table of Hugging Face names."""
    import gguf

    architecture = file.metadata["general.architecture"].upper()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.n_layers)
    found = {}
    for name in (piece.source for piece in wanted):
        expert = _EXPERT.search(name)
        theirs = table.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight",))
        if theirs is None or theirs not in file.tensors:
            raise UserError(f"{file.path} lacks {theirs or name}")
        found[name] = file.tensors[theirs], (int(expert[1]),) if expert else ()
    return found


def _compare(
    file: GgufFile,
    wanted: list[Piece],
    sources: Mapping[str, tuple[GgufTensor, tuple[int, ...]]],
) -> None:
    for piece in wanted:
        tensor, index = sources[piece.source]
        if tensor.shape[len(index) :] != piece.shape:
            raise UserError(
                f"{file.path}: {tensor.name} has shape {list(tensor.shape)}; its metadata give"
                f" {list(piece.shape)}{' for each expert' if index else ''}"
            )
    used = {tensor.name for tensor, _ in sources.values()}
    extra = [name for name in file.tensors if name not in used and name != ROPE_FACTORS]
    if extra:
        raise UserError(f"{file.path} has tensors that the model lacks: {listed(extra)}")


def _halves(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of queries or keys as Hugging Face orders them: RoPE pairs (i, i + H/2).

    llama.cpp's llama rotates neighbours (2i, 2i + 1), and its converter reorders rows to fit.
    """
    pairs = array.reshape(-1, head_dim // 2, 2, array.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
