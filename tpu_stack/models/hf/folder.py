"""A Hugging Face folder opened: its model, and where each of its tensors lies.

Opening reads config.json and the headers of the weight files only, and compares every name and
shape with what the model needs, so that a wrong folder is refused before any weight is read.

    folder = HuggingFaceFolder.open(Path("Qwen3-0.6B"))
    folder.config.n_layers  # 28
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.families import OTHER_MODALITIES, Family
from tpu_stack.models.hf.names import Piece, pieces
from tpu_stack.models.hf.read_config import read_config
from tpu_stack.models.hf.safetensors_file import StoredTensor, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SHOWN = 5
"""Names listed in an error before the rest is counted."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """An opened folder. Invariant: `tensors` has one entry of the right shape per piece.

    Attributes:
      left_out: tensors that belong to other modalities of a multimodal model.
    """

    path: Path
    family: Family
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    left_out: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> "HuggingFaceFolder":
        """Reads config and headers.

        Raises UserError, with names, for a folder that is none, an architecture that is not known,
        tensors that are missing, left over, of another shape or of a dtype that is no float.
        """
        family, config = read_config(read_json(path / CONFIG), str(path / CONFIG))
        text, left_out = _text_tensors(_stored(path))
        wanted = {piece.source: piece for piece in pieces(family, config)}
        _compare(path, config, wanted, text)
        tensors = {name: text[name] for name in wanted}
        return cls(path, family, config, tensors, left_out)

    def pieces(self) -> list[Piece]:
        """What goes where."""
        return list(pieces(self.family, self.config))

    def read(self, piece: Piece) -> np.ndarray:
        """A piece as it is stored here, [in, out], in the dtype of the file."""
        array = self.tensors[piece.source].read()
        return array.T if piece.transposed else array


def read_json(path: Path) -> Any:
    """The JSON of a file. Raises UserError when there is none, or it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}; give a Hugging Face folder") from error
    except NotADirectoryError as error:
        raise UserError(f"{path.parent} is a file; give a Hugging Face folder") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files."""
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
            raise UserError(f"{path / INDEX} has no weight_map from tensors to files")
        files = sorted(set(places.values()))
        absent = [name for name in files if not (path / name).is_file()]
        if absent:
            raise UserError(f"{path} lacks {listed(absent)}, which its {INDEX} names")
    else:
        files = sorted(file.name for file in path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{path} has no *.safetensors file; other weight files are not read")
    found: dict[str, StoredTensor] = {}
    for name in files:
        for tensor, stored in read_header(path / name).items():
            if tensor in found:
                raise UserError(f"{path}: {tensor} is in {found[tensor].file.name} and {name}")
            found[tensor] = stored
    return found


def _text_tensors(
    stored: dict[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The text model's tensors under the names they have alone, and the other modalities' names.

    A multimodal folder writes "language_model.model.X" (transformers 4) or
    "model.language_model.X" (5) for what is "model.X" in a text model's.
    """
    text: dict[str, StoredTensor] = {}
    left_out: list[str] = []
    for name, tensor in stored.items():
        if name.removeprefix("model.").startswith(OTHER_MODALITIES):
            left_out.append(name)
        elif name.startswith("model.language_model."):
            text["model." + name.removeprefix("model.language_model.")] = tensor
        else:
            text[name.removeprefix("language_model.")] = tensor
    return text, tuple(left_out)


def _compare(
    path: Path, config: ModelConfig, wanted: dict[str, Piece], stored: dict[str, StoredTensor]
) -> None:
    missing = [name for name in wanted if name not in stored]
    extra = [name for name in stored if name not in wanted and not _harmless(name)]
    if config.tie_embeddings and "lm_head.weight" in extra:
        _check_tied(path, stored["lm_head.weight"], stored.get("model.embed_tokens.weight"))
        extra.remove("lm_head.weight")
    wrong = [
        f"{name} {list(stored[name].shape)} (the config gives {list(piece.shape)})"
        for name, piece in wanted.items()
        if name in stored and stored[name].shape != piece.shape
    ]
    found = (("lacks", missing), ("has tensors that the model lacks:", extra))
    problems = [f"{what} {listed(names)}" for what, names in found if names]
    problems += [f"has another shape: {listed(wrong)}"] if wrong else []
    if problems:
        raise UserError(
            f"{path} does not hold the model of its {CONFIG}: it {'; it '.join(problems)}"
        )


def _harmless(name: str) -> bool:
    """Tables that old files carry and every model computes."""
    return name.endswith("rotary_emb.inv_freq")


def _check_tied(path: Path, head: StoredTensor, table: StoredTensor | None) -> None:
    if table is None or head.shape != table.shape or not np.array_equal(head.read(), table.read()):
        raise UserError(
            f"{path}: tie_word_embeddings is true, and lm_head.weight is another tensor than"
            " model.embed_tokens.weight"
        )


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
