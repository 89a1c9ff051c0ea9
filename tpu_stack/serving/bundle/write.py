"""Writing a bundle, one tensor at a time.

Safetensors puts a header that lists every tensor before their bytes
(https://github.com/huggingface/safetensors#format), and its library wants all of a file's tensors
at once. Here room is left for the header, which may end in spaces, and it is written last.

    write_bundle(out, config, "int4", tokenizer, source, tensors)
"""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.data.tokenizer import Tokenizer
from tpu_stack.errors import UserError
from tpu_stack.files import replacing_folder
from tpu_stack.models.config import ModelConfig
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.packing import pack_values
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.serving.manifest import MANIFEST, TOKENIZER, Manifest, Part, TensorEntry
from tpu_stack.serving.weights import Tensor

FILE_BYTES = 4 * 2**30
"""A weights file is closed when it has reached this size."""
HEADER_BYTES = 2**16
"""Room for a file's header; a file is closed too when its tensors might need more."""
_PART_BYTES = 512
"""More than the header takes for one array, but for its name."""

_SAFETENSORS = {
    "float32": "F32",
    "bfloat16": "BF16",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


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
        raise UserError(f"{out} exists; a bundle is never overwritten, choose another folder")
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
    file: _WeightsFile | None = None
    number = 0
    try:
        for name, tensor in tensors:
            if file is None:
                number += 1
                file = _WeightsFile(folder / f"weights-{number:05d}.safetensors")
            yield name, file.add(name, tensor)
            if file.full:
                file.finish()
                file = None
        if file is not None:
            file.finish()
    except OSError as error:
        raise UserError(f"cannot write the bundle's weights: {error.strerror or error}") from error
    finally:
        if file is not None:
            file.close()


class _WeightsFile:
    """A safetensors file that grows by a tensor at a time."""

    def __init__(self, path: Path):
        self._name = path.name
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + HEADER_BYTES)
        self._header: dict[str, Any] = {}
        self._end = self._room = 0

    @property
    def full(self) -> bool:
        return self._end >= FILE_BYTES or self._room > HEADER_BYTES // 2

    def add(self, name: str, tensor: Tensor) -> TensorEntry:
        """Writes the parts of a tensor; says where they are."""
        if not isinstance(tensor, QTensor):
            format = "float32" if tensor.dtype == np.float32 else "bf16"
            parts = {"values": self._write(f"{name}.values", np.asarray(tensor))}
            return TensorEntry(tuple(tensor.shape), format, None, parts)
        arrays = {part: getattr(tensor, part) for part in PARTS}
        arrays["values"] = pack_values(np.asarray(tensor.values), get_format(tensor.format))
        parts = {
            part: self._write(f"{name}.{part}", np.asarray(array))
            for part, array in arrays.items()
            if array is not None
        }
        return TensorEntry(
            tensor.shape, tensor.format, tensor.contract_axis, parts, tensor.rotation
        )

    def _write(self, name: str, array: np.ndarray) -> Part:
        begin, self._end = self._end, self._end + array.nbytes
        dtype, shape = str(array.dtype), tuple(array.shape)
        self._header[name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(shape),
            "data_offsets": [begin, self._end],
        }
        self._room += _PART_BYTES + len(name)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._file.write(data)
        checksum = xxhash.xxh3_128_hexdigest(data)
        return Part(self._name, 8 + HEADER_BYTES + begin, len(data), dtype, shape, checksum)

    def finish(self) -> None:
        """Writes the header and closes the file."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(HEADER_BYTES)
        assert len(header) == HEADER_BYTES
        self._file.seek(0)
        self._file.write(struct.pack("<Q", HEADER_BYTES) + header)
        self.close()

    def close(self) -> None:
        """Closes the file, finished or not."""
        self._file.close()
