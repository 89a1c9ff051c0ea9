"""What the serving engine holds on one device: packed weights in layers, pages, decoding state, and
the working set of one layer or of sampling.

Pages and state are donated and updated in place, so each counts once. What depends on the mesh and
the format alone, the weights, is counted once for all batches (`ServeMemory`), so that a search
asks this same prediction of every candidate.

    memory = ServeMemory(config, profile, "int4")
    memory.predict("decode", batch=16, context=4096, prompt=1024).at_most[0].name
"""

from math import prod
from typing import Any

import jax

from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.paged_attention import BLOCK
from tpu_stack.planner.aot.target import PROXY
from tpu_stack.planner.memory.prediction import Prediction, Term, array, axes_text, local, shard
from tpu_stack.planner.memory.tiles import padded_bytes, row_major_bytes
from tpu_stack.planner.tensors import shard_count
from tpu_stack.planner.workload import PrefillStep
from tpu_stack.quant.policy import stored_format
from tpu_stack.quant.qtensor import abstract_qtensor
from tpu_stack.serving.engine.build import PAGE
from tpu_stack.serving.layout import scales_spec
from tpu_stack.serving.replicas import AXIS, one_replica
from tpu_stack.serving.requests import MAX_BIASES
from tpu_stack.sharding.axes import FFW, HEADS, KV_HEADS, LAYERS, VOCAB, TensorSpec
from tpu_stack.sharding.profiles import Profile

_MIB = 2**20
CODE = {"prefill": (2.5, 5.2, 0.45), "decode": (4.5, 0.4, 0.21)}
"""Program -> MiB of its code: what it has once, in each layer, and in each layer's product with
packed weights, as every call of a kernel is written out (libtpu 0.0.52). A kernel's code grows with
the rows of its block, hardly with the model."""
WIDE_BLOCKS = {"v4": 0.8, "v5e": 0.8, "v5p": 0.8}
"""Chips, whose MXU multiplies 128 x 128 at a time, -> MiB of a prefill's product."""


class ServeMemory:
    """The engine's programs on one mesh, from weights of one format.

    Raises UserError when a tensor, or the groups of its scales, do not divide the mesh.
    """

    def __init__(self, config: ModelConfig, profile: Profile, format: str):
        self.config, self.format = config, format
        self.replicas, self.profile = profile.mesh.get(AXIS, 1), one_replica(profile)
        self.weights = self._weights()

    def predict(self, program: str, *, batch: int, context: int, prompt: int) -> Prediction:
        """One program's terms on one device.

        Args:
          batch: slots over all replicas. context: tokens of each. prompt: of a prompt.
        """
        slots = batch // self.replicas
        page = PAGE["tpu"]
        pages = slots * -(-context // page)
        state = self._state(slots, -(-context // page) * page)
        if program == "decode":
            return Prediction(
                (*self.weights, *self._pages(pages, kernel=True), *state),
                {"sampling": self._sampling(slots), "layer": self._layer(slots, 1)},
                self._code(program),
            )
        step = PrefillStep.of(prompt, slots)
        logits = array("logits", "float32", (step.rows, self.config.vocab_size), "unsplit")
        return Prediction(
            (*self.weights, *self._pages(pages), logits),
            {
                "attention": self._attention(step.rows, step.chunk),
                "layer": self._layer(step.rows, step.chunk),
            },
            self._code(program),
            beside=state,
        )

    def _code(self, program: str) -> int:
        once, layer, product = CODE[program]
        chip = PROXY.get(self.profile.chip, self.profile.chip)
        if program == "prefill":
            product = WIDE_BLOCKS.get(chip, product)
        specs = [spec for spec in tensor_specs(self.config) if spec.axes[0] == LAYERS]
        packed = sum(stored_format(spec, self.format).quantized for spec in specs)
        return round(_MIB * (once + self.config.n_layers * (layer + packed * product)))

    def _weights(self) -> tuple[Term, ...]:
        specs = tensor_specs(self.config)
        given = [(stored_bytes(spec, self.format, self.profile), spec) for spec in specs]
        layers = sum(size for size, spec in given if spec.axes[0] == LAYERS)
        tables = sum(size for size, _ in given) - layers
        split = axes_text((VOCAB, HEADS), self.profile)
        return (
            Term("weights of the layers", layers, self.format, f"all layers, {split}", True),
            Term("embedding tables", tables, self.format, split, True),
        )

    def _pages(self, pages: int, *, kernel: bool = False) -> tuple[Term, ...]:
        """[K, L*P, page, H] of keys and of values, in the layout that pads them least.

        The kernel of decode reads them row by row, with H along the lanes. Where H fills no lanes,
        the compiler holds them in that layout too, padded, and three halves of them as they were
        (libtpu 0.0.52, v6e).
        """
        config = self.config
        heads = config.n_kv_heads // shard_count(self.profile, KV_HEADS)
        shape = (heads, config.n_layers * pages, PAGE["tpu"], config.head_dim)
        dtype = self.profile.precision.cache or self.profile.precision.compute
        bits = 8 * jax.numpy.dtype(dtype).itemsize
        half, padded = padded_bytes(shape, bits), row_major_bytes(shape, bits)
        text = f"2 x {dtype}[{','.join(map(str, shape))}]"
        split = f"all layers, {axes_text((KV_HEADS,), self.profile)}"
        given = Term("pages of keys and values", 2 * half, text, split, True)
        if padded == half or not kernel:
            return (given,)
        return (given, Term("pages, padded for the kernel", 2 * padded + 3 * half, text, split))

    def _state(self, slots: int, length: int) -> tuple[Term, ...]:
        """Of the decoding rows: how often each token is in the output, which are in the prompt, the
        tokens themselves, and sampling's biases. Whole on every device."""
        vocab = self.config.vocab_size
        counts = row_major_bytes((slots, vocab), 32) + row_major_bytes((slots, vocab), 8)
        rows = row_major_bytes((slots, length), 32) + 2 * row_major_bytes((slots, MAX_BIASES), 32)
        return (
            Term("counts of tokens", counts, f"int32, bool[{slots},{vocab}]", "unsplit", True),
            Term("tokens and sampling", rows, f"int32[{slots},{length}], ...", "unsplit", True),
        )

    def _sampling(self, slots: int) -> tuple[Term, ...]:
        """Whole rows of logits, and the same adjusted."""
        shape = (slots, self.config.vocab_size)
        return (array("logits, gathered and adjusted", "float32", shape, "unsplit", 2),)

    def _attention(self, rows: int, chunk: int) -> tuple[Term, ...]:
        """One layer's attention of a chunk, a block of pages at a time: queries, the running
        output, and the scores of a block, of which the softmax makes two more arrays."""
        config, profile = self.config, self.profile
        heads = config.n_heads // shard_count(profile, HEADS)
        split = f"one layer, {axes_text((HEADS,), profile)}"
        out = (rows, chunk * heads, config.head_dim)
        return (
            array("queries and attention's output", "bfloat16", out, split, 2),
            array("attention's running output", "float32", out, split, 2),
            array("attention scores of a block", "float32", (rows, chunk * heads, BLOCK), split, 3),
            array("hidden states", "bfloat16", (rows, chunk, config.d_model), "unsplit", 2),
        )

    def _layer(self, rows: int, tokens: int) -> tuple[Term, ...]:
        """One layer's MLP or experts over `tokens` of each row."""
        config, profile = self.config, self.profile
        each = config.experts_per_token if config.n_experts else 1
        ffw = (rows * tokens * each, config.d_ff // shard_count(profile, FFW))
        wide = f"one layer, {axes_text((FFW,), profile)}"
        hidden = (rows * tokens, config.d_model)
        terms = (
            array("MLP widths", "bfloat16", ffw, wide, 3 if config.gated_mlp else 2),
            array("hidden states", "bfloat16", hidden, "unsplit", 3),
        )
        if not config.n_experts:
            return terms
        sent = (rows * tokens * each, config.d_model)
        return (
            *terms,
            array("rows sent to experts and back", "bfloat16", sent, "one layer", 2),
        )


def stored_bytes(spec: TensorSpec, format: str, profile: Profile) -> int:
    """Bytes of a tensor as one device stores it for serving: each layer by itself, scales and the
    padding of tiles included."""
    fmt, layers = stored_format(spec, format), spec.shape[0] if spec.axes[0] == LAYERS else 1
    stacked = spec.axes[0] == LAYERS

    def size(shape: tuple[int, ...], bits: int, *, row_major: bool = True) -> int:
        shape = shape[1:] if stacked else shape
        return layers * (row_major_bytes if row_major else padded_bytes)(shape, bits)

    if not fmt.quantized:
        return size(local(spec, profile), fmt.bits, row_major=False)
    packed = abstract_qtensor(spec.shape, fmt.name, spec.contract_axis or -2, name=spec.name)
    values = shard(packed.values.shape, spec.axes, profile)
    scales = _split(packed.scales.shape, scales_spec(spec, packed, profile), profile)
    one = -1 if packed.contract_axis == -1 else -2  # scales' axis of one lies outside the others
    scales = (*scales[: one - 1], 1, scales[one - 1], *scales[one:][1:])
    bits = 32 if packed.packed_bits else fmt.bits
    level: Any = packed.tensor_scale
    extra = size(level.shape, 32, row_major=False) if level is not None else 0
    return size(values, bits) + size(scales, fmt.scale_bits) + extra


def _split(
    shape: tuple[int, ...], spec: jax.sharding.PartitionSpec, profile: Profile
) -> tuple[int, ...]:
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return tuple(
        size // prod(profile.mesh[name] for name in axes)
        for size, axes in zip(shape, names, strict=True)
    )
