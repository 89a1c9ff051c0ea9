"""Bundles: frozen, packed, checksummed, read-only weights with all that serving them needs.

A folder of `manifest.json`, `tokenizer.json`, `weights-NNNNN.safetensors` and, for a model that was
taught to chat, `chat.json`.

    bundle = Bundle.open(Path("bundle"))
    params = bundle.load(profile, mesh)
"""

from tpu_stack.serving.bundle.read import Bundle
from tpu_stack.serving.bundle.write import write_bundle

__all__ = ["Bundle", "write_bundle"]
