"""Bundles: frozen, packed, checksummed, read-only weights with all that serving them needs.

A folder of `manifest.json`, `tokenizer.json`, `weights-NNNNN.safetensors` and, for a model that was
taught to chat, `chat.json`. Tensors are read one at a time and verified before they reach a device,
so a damaged one is named.

>>> bundle = Bundle.open(Path("bundle"))
>>> params = bundle.load(profile, mesh)
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import xxhash
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.files import replacing_folder
from tpu_stack.models.abstract import map_specs, tensor_of
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.per_layer import PerLayer, without_layers
from tpu_stack.models.transposed import transpose_tensor
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.packing import pack_values, unpack_values
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.quant.tpu_layout import tpu_layout
from tpu_stack.serving.layout import PackedLayout
from tpu_stack.serving.manifest import MANIFEST, TOKENIZER, Manifest, Part, TensorEntry
from tpu_stack.sharding.axes import LAYERS, TensorSpec
from tpu_stack.sharding.profiles import Profile

FILE_BYTES = 4 * 2**30
"""A weights file is closed when it has reached this size."""

Tensor = np.ndarray | QTensor


def write_bundle(
    out: Path,
    config: ModelConfig,
    format: str,
    tokenizer: Tokenizer,
    source: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    rotation: int = 0,
    chat: ChatFormat | None = None,
) -> Manifest:
    """Writes a bundle to `out`, whole or not at all; its files are made read-only.

    `tensors` are (name, host array or QTensor of host arrays), consumed one at a time; `rotation`
    is what `pack` was asked for. An empty `chat` is not written.
    """
    chat = chat or ChatFormat()
    chat_digest = None if chat == ChatFormat() else chat.digest()
    if out.exists():
        raise UserError(f"{out} exists; a bundle is never overwritten, choose another --out")
    with replacing_folder(out) as partial:
        entries = dict(_write_weights(partial, tensors))
        manifest = Manifest(
            config, format, source, tokenizer.digest(), entries, rotation, chat_digest
        )
        if chat_digest is not None:
            (partial / CHAT).write_text(chat.to_json(), encoding="utf-8")
        (partial / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o444)
    return manifest


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, TensorEntry]]:
    pending: dict[str, np.ndarray] = {}
    described: dict[str, TensorEntry] = {}
    number = 0
    for name, tensor in tensors:
        if isinstance(tensor, QTensor):
            packed = pack_values(np.asarray(tensor.values), get_format(tensor.format))
            pending[f"{name}.values"] = packed
            pending[f"{name}.scales"] = np.asarray(tensor.scales)
            if tensor.tensor_scale is not None:
                pending[f"{name}.tensor_scale"] = np.asarray(tensor.tensor_scale)
            described[name] = TensorEntry(
                tensor.shape, tensor.format, tensor.contract_axis, {}, tensor.rotation
            )
        else:
            pending[f"{name}.values"] = np.asarray(tensor)
            format = "float32" if tensor.dtype == np.float32 else "bf16"
            described[name] = TensorEntry(tuple(tensor.shape), format, None, {})
        if sum(array.nbytes for array in pending.values()) >= FILE_BYTES:
            number += 1
            yield from _write_file(folder, number, pending, described)
            pending, described = {}, {}
    if pending:
        yield from _write_file(folder, number + 1, pending, described)


def _write_file(
    folder: Path,
    number: int,
    arrays: dict[str, np.ndarray],
    described: dict[str, TensorEntry],
) -> Iterator[tuple[str, TensorEntry]]:
    file = f"weights-{number:05d}.safetensors"
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        save_file(arrays, folder / file)
    except SafetensorError as error:  # wraps the operating system's error, a full disk for one
        raise UserError(f"cannot write the bundle's {file}: {error}") from error
    header_bytes, header = _safetensors_header(folder / file)

    def part(name: str) -> Part:
        array = arrays[name]
        begin, end = header[name]["data_offsets"]
        checksum = xxhash.xxh3_128_hexdigest(array.reshape(-1).view(np.uint8).data)
        return Part(
            file, header_bytes + begin, end - begin, str(array.dtype), array.shape, checksum
        )

    for name, entry in described.items():
        kinds = [kind for kind in PARTS if f"{name}.{kind}" in arrays]
        yield name, replace(entry, parts={kind: part(f"{name}.{kind}") for kind in kinds})


def _safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


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
        """The verified parameter tree, sharded by `profile` on `mesh`, one tensor at a time; with
        `split`, as engines run them: the blocks' weights in layers (`models.per_layer`), and for
        one CPU device transposed (`models.transposed`).

        On CPU sub-byte values are widened to a byte each, which XLA:CPU reads five times faster;
        the numbers are the same. Raises UserError naming a damaged or missing tensor.
        """
        layout = PackedLayout.of(
            self.config, self.manifest.format, profile, mesh, self.manifest.rotation
        )
        on_cpu = mesh.devices.flat[0].platform == "cpu"

        def one(spec: TensorSpec) -> Any:
            tensor = self.read_tensor(spec.name)
            if isinstance(tensor, QTensor) and on_cpu:
                tensor = tensor.widen()
            target = tensor_of(layout.abstract, spec.name)
            if not split:
                return _placed(tensor, target)
            if spec.axes[0] != LAYERS:
                return transpose_tensor(spec, _placed(tensor, target), mesh)
            layers = (_placed(tensor, target, layer) for layer in range(spec.shape[0]))
            return transpose_tensor(spec, PerLayer(tuple(layers)), mesh)

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


def _placed(tensor: Tensor, target: Any, layer: int | None = None) -> Any:
    """`tensor`, or one layer of it, laid out as `target`, which has all layers."""
    if isinstance(tensor, QTensor):
        parts = {part: getattr(tensor, part) for part in PARTS}
        placed = {
            part: _place(array, getattr(target, part).sharding, layer, part, tensor.contract_axis)
            for part, array in parts.items()
            if array is not None
        }
        return replace(tensor, **placed)
    return _place(tensor, target.sharding, layer)


def _place(
    array: np.ndarray,
    sharding: NamedSharding,
    layer: int | None,
    part: str | None = None,
    contract_axis: int = -2,
) -> jax.Array:
    if layer is not None:
        array, sharding = array[layer], without_layers(sharding)
    place = sharding if part is None else tpu_layout(sharding, part, contract_axis, array.ndim)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
