"""Opening a bundle: tensors are read one at a time and verified before they reach a device, so that
a damaged one is named.

    bundle = Bundle.open(Path("bundle"))
    params = bundle.load(profile, mesh)
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash
from jax.sharding import Mesh

from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.packing import unpack_values
from tpu_stack.quant.qtensor import QTensor
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.manifest import TOKENIZER, Manifest, Part
from tpu_stack.serving.weights import Tensor, held_tensor, layers_of, placed
from tpu_stack.sharding.axes import TensorSpec
from tpu_stack.sharding.profiles import Profile


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Nothing here writes to it."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Reads the manifest only. Raises UserError when `path` is not an intact bundle."""
        return cls(path, Manifest.read(path))

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.manifest.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError when its file was changed."""
        path = self.path / TOKENIZER
        if not path.is_file():
            raise UserError(f"{self.path} is damaged: {TOKENIZER} is missing")
        text = path.read_text(encoding="utf-8", errors="replace")
        tokenizer = Tokenizer.from_json(text, where=str(path))
        if tokenizer.digest() != self.manifest.tokenizer_digest:
            raise UserError(f"{path} is damaged: its digest does not match the manifest")
        return tokenizer

    @cached_property
    def chat(self) -> ChatFormat:
        """How to write a conversation; empty where the bundle has no chat.json.

        Raises UserError when the file was changed, is missing, or was put there later.
        """
        chat, wanted = ChatFormat.read(self.path), self.manifest.chat_digest
        if (None if chat == ChatFormat() else chat.digest()) != wanted:
            raise UserError(f"{self.path / CHAT} is damaged: its digest does not match")
        return chat

    def load(self, profile: Profile, mesh: Mesh, *, split: bool = False) -> dict[str, Any]:
        """The verified parameter tree, sharded by `profile` on `mesh`, one tensor at a time.

        With `split` as an engine holds it (`serving.weights`), else stacked over layers, for
        `forward` to scan. Raises UserError naming a damaged or missing tensor.
        """
        layout = PackedLayout.of(
            self.config, self.manifest.format, profile, mesh, self.manifest.rotation
        )

        def one(spec: TensorSpec) -> Any:
            tensor, target = self.read_tensor(spec.name), tensor_of(layout.abstract, spec.name)
            if split:
                return held_tensor(spec, layers_of(spec, tensor), target, mesh)
            return placed(tensor, target, mesh)

        return map_specs(self.config, one)

    def read_tensor(self, name: str) -> Tensor:
        """One tensor as host arrays, verified. Raises UserError naming it when damaged."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise UserError(f"{self.path} is damaged: the manifest lacks tensor {name}")
        arrays = {kind: self._read_part(name, part) for kind, part in entry.parts.items()}
        fmt = get_format(entry.format)
        if not fmt.quantized:
            return arrays["values"]
        values = unpack_values(arrays["values"], fmt, entry.shape[-2])
        assert entry.contract_axis is not None
        return QTensor(
            values,
            arrays["scales"],
            entry.format,
            entry.contract_axis,
            arrays.get("tensor_scale"),
            entry.rotation,
        )

    def _read_part(self, name: str, part: Part) -> np.ndarray:
        path = self.path / part.file
        try:
            with path.open("rb") as file:
                file.seek(part.offset)
                data = file.read(part.nbytes)
        except OSError as error:
            raise UserError(f"{path}: cannot read tensor {name}: {error.strerror}") from error
        if len(data) != part.nbytes or xxhash.xxh3_128_hexdigest(data) != part.xxh3_128:
            raise UserError(f"{path} is damaged: tensor {name} does not match its checksum")
        dtype = np.dtype(getattr(ml_dtypes, part.dtype, part.dtype))
        return np.frombuffer(data, dtype).reshape(part.shape)
