"""The manifest of a bundle: what it holds, where each tensor's bytes are, and their checksums.

Example:
    manifest = Manifest.read(Path("bundle"))
    manifest.tensors["final_norm.scale"].format  # 'bf16'
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3

from tpu_stack import __version__
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig

FORMAT_VERSION = 2
"""1 had float32, bf16, int8 and int4 without rotation; such bundles still load."""
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Part:
    """One array in a weights file. `dtype` and `shape` are those on disk, where sub-byte values
    share bytes (see `quant.packing`)."""

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True)
class TensorEntry:
    """One parameter: its logical shape, how it is stored, and its parts.

    Parts are "values", "scales" for a quantized format, "tensor_scale" for a two-level one.
    `rotation` is the block of a rotated contraction axis, 0 for none.
    """

    shape: tuple[int, ...]
    format: str
    contract_axis: int | None
    parts: dict[str, Part]
    rotation: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its bytes. Self-contained: no training run is needed.

    `chat_digest` is None where the bundle has no chat.json.
    """

    config: ModelConfig
    format: str
    source: dict[str, Any]
    tokenizer_digest: str
    tensors: dict[str, TensorEntry]
    rotation: int = 0
    chat_digest: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk, scales included."""
        return sum(part.nbytes for entry in self.tensors.values() for part in entry.parts.values())

    def to_json(self) -> str:
        """Indented JSON that ends in a digest of itself."""
        body = {
            "format_version": FORMAT_VERSION,
            "written_by": f"tpu-stack {__version__}",
            "model": self.config.to_dict(),
            "format": self.format,
            "rotation": self.rotation,
            "source": self.source,
            "tokenizer_digest": self.tokenizer_digest,
            "chat_digest": self.chat_digest,
            "tensors": {name: asdict(entry) for name, entry in self.tensors.items()},
        }
        return json.dumps(dict(body, digest=_digest(body)), indent=1) + "\n"

    @classmethod
    def read(cls, bundle: Path) -> "Manifest":
        """The manifest of `bundle`.

        Raises UserError when it is no bundle, was changed, or is of a version not known here.
        """
        path = bundle / MANIFEST
        if not path.is_file():
            raise UserError(f"{bundle} is not a bundle: it has no {MANIFEST}; write one with"
                            " `tpu-stack pack`")  # fmt: skip
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            digest = body.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        _check_version(body.get("format_version"), path)
        if digest != _digest(body):
            raise UserError(f"{path} is damaged: its digest does not match")
        tensors = {name: _entry(fields) for name, fields in body["tensors"].items()}
        config = ModelConfig.from_dict(body["model"])
        return cls(
            config,
            body["format"],
            body["source"],
            body["tokenizer_digest"],
            tensors,
            body.get("rotation", 0),
            body.get("chat_digest"),
        )


def _check_version(version: Any, path: Path) -> None:
    if version in range(1, FORMAT_VERSION + 1):
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    raise UserError(
        f"{path} has format version {version}; this program reads 1 to {FORMAT_VERSION}"
        + ("; a newer tpu-stack wrote it" if newer else "")
    )


def _entry(fields: dict[str, Any]) -> TensorEntry:
    parts = {
        name: Part(**dict(part, shape=tuple(part["shape"])))
        for name, part in fields["parts"].items()
    }
    return TensorEntry(
        tuple(fields["shape"]),
        fields["format"],
        fields["contract_axis"],
        parts,
        fields.get("rotation", 0),
    )


def _digest(body: dict[str, Any]) -> str:
    return blake3.blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()
