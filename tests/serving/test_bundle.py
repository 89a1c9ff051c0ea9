"""Packing and loading: the same numbers as `quantize`, and any damage names what it hit."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blake3
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from serving_model import STEP, serving

from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.errors import UserError
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.quant import quantize
from tpu_stack.quant.formats import FORMATS as EVERY_FORMAT
from tpu_stack.quant.formats import get_format
from tpu_stack.quant.packing import pack_values
from tpu_stack.quant.policy import stored_format
from tpu_stack.quant.qtensor import PARTS, QTensor
from tpu_stack.serving import pack as pack_module
from tpu_stack.serving.bundle import Bundle, write
from tpu_stack.serving.layout import PackedLayout, bytes_per_device, packed_bytes_per_device
from tpu_stack.serving.manifest import Manifest
from tpu_stack.serving.pack import pack
from tpu_stack.serving.weights import stored_tensor
from tpu_stack.sharding.profiles import get_profile

FORMATS = [name for name in EVERY_FORMAT if "_g" not in name]
"""Every format, in its smallest group."""
MESH = "data=2,tensor=2"


@pytest.fixture
def copy(bundles, tmp_path) -> Path:
    """A writable copy of the int4 bundle, to damage."""
    path = shutil.copytree(bundles["int4"], tmp_path / "bundle")
    for file in path.iterdir():
        file.chmod(0o644)
    return path


def leaf(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree


def expected(trained, spec, format: str):
    """What a tensor must be stored as: quantized or cast straight from the float32 weights."""
    fmt, weight = stored_format(spec, format), leaf(trained.params, spec.name)
    if fmt.quantized:
        return quantize(weight, fmt, spec.contract_axis)
    return np.asarray(jnp.asarray(weight).astype(fmt.dtype))


def assert_same(found, wanted) -> None:
    """Equal bit for bit; sub-byte values may come widened to bytes."""
    assert isinstance(found, QTensor) == isinstance(wanted, QTensor)
    if isinstance(found, QTensor):
        found.check()
        wanted = wanted.widen() if found.widened else wanted
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    "format",
    [
        name if name in ("float32", "int4", "int1") else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
    ],
)
def test_every_tensor_is_what_quantize_gives(trained, bundles, format):
    bundle = Bundle.open(bundles[format])
    assert list(bundle.manifest.tensors) == [spec.name for spec in tensor_specs(trained.config)]
    for spec in tensor_specs(trained.config):
        assert_same(bundle.read_tensor(spec.name), expected(trained, spec, format))


@pytest.mark.parametrize("mesh", ["data=1", "data=2,tensor=2", "tensor=4"])
@pytest.mark.parametrize("format", ["bf16", "int4", "nvfp4"])
def test_loads_onto_any_mesh(trained, bundles, format, mesh):
    profile, devices = serving(mesh)
    params = Bundle.open(bundles[format]).load(profile, devices)
    layout = PackedLayout.of(trained.config, format, profile, devices)
    for spec in tensor_specs(trained.config):
        found = leaf(params, spec.name)
        assert_same(found, expected(trained, spec, format))
        like = leaf(layout.abstract, spec.name)
        for part in PARTS if isinstance(found, QTensor) else ():
            array = getattr(found, part)  # widening folds a tensor's scale into the others
            assert array is None or array.sharding == getattr(like, part).sharding
        assert isinstance(found, QTensor) or found.sharding == like.sharding


@pytest.mark.parametrize("format", FORMATS)
def test_sizes_are_told_without_packing(trained, bundles, format):
    manifest = Manifest.read(bundles[format])
    one_device = get_profile("8i", "serve").emulate(1)
    assert manifest.nbytes == bytes_per_device(trained.config, format, one_device)
    for spec in tensor_specs(trained.config):
        stored, size = packed_bytes_per_device(spec, format, one_device)
        entry = manifest.tensors[spec.name]
        assert (entry.format, entry.shape) == (stored, spec.shape)
        assert sum(part.nbytes for part in entry.parts.values()) == size


SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "uint8": "U8", "int32": "I32"}
SAFETENSORS |= {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
}


@pytest.mark.parametrize("format", FORMATS)
def test_the_safetensors_library_reads_the_weights(trained, bundles, format):
    """Others' tools see the same arrays; sub-byte values as bytes that hold several each."""
    (file,) = bundles[format].glob("*.safetensors")
    found = dict(safetensors.deserialize(file.read_bytes()))
    for spec in tensor_specs(trained.config):
        wanted = expected(trained, spec, format)
        if isinstance(wanted, QTensor):
            arrays = {part: getattr(wanted, part) for part in PARTS}
            arrays["values"] = pack_values(np.asarray(wanted.values), get_format(wanted.format))
        else:
            arrays = {"values": wanted}
        for part, array in arrays.items():
            if array is not None:
                tensor = found.pop(f"{spec.name}.{part}")
                assert tensor["dtype"] == SAFETENSORS[str(array.dtype)]
                assert tuple(tensor["shape"]) == array.shape
                assert tensor["data"] == np.asarray(array).tobytes()
    assert not found


def test_a_bundle_stands_alone(trained, bundles):
    bundle = Bundle.open(bundles["int4"])
    assert bundle.config == trained.config
    assert bundle.tokenizer == trained.tokenizer
    assert bundle.manifest.format == "int4"
    assert bundle.manifest.source == {
        "step": STEP,
        "profile": "8i",
        "mesh": {"data": 2, "tensor": 2},
    }
    for file in bundles["int4"].iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o444


def test_large_bundles_are_several_files(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "FILE_BYTES", 8000)
    pack(trained.run, "int8", *serving(MESH), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    files = {part.file for e in bundle.manifest.tensors.values() for part in e.parts.values()}
    assert files == {path.name for path in (tmp_path / "bundle").glob("*.safetensors")}
    assert len(files) > 3
    for spec in tensor_specs(trained.config):
        assert_same(bundle.read_tensor(spec.name), expected(trained, spec, "int8"))


def test_nothing_is_overwritten(trained, bundles):
    before = (bundles["int8"] / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists; a bundle is never overwritten"):
        pack(trained.run, "int4", *serving(MESH), bundles["int8"])
    assert (bundles["int8"] / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_pack_leaves_nothing(trained, tmp_path, monkeypatch, failure):
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise failure
        return stored_tensor(*args, **kwargs)

    monkeypatch.setattr(pack_module, "stored_tensor", failing)
    raised = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(raised):
        pack(trained.run, "int4", *serving(MESH), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_pack_refusals(trained, tmp_path):
    out = tmp_path / "bundle"
    with pytest.raises(UserError, match="unknown weight format 'int5'"):
        pack(trained.run, "int5", *serving(MESH), out)
    with pytest.raises(UserError, match="holds no checkpoints"):
        pack(tmp_path / "nothing", "int8", *serving(MESH), out)
    with pytest.raises(UserError, match="no checkpoint of step 31"):
        pack(trained.run, "int8", *serving(MESH), out, step=31)
    # Four key heads do not split over eight devices.
    with pytest.raises(UserError, match=r"blocks\.attention\.wk: axis 'kv_heads' has 4 parts"):
        pack(trained.run, "int8", *serving("tensor=8"), out)
    assert not out.exists()


@pytest.mark.slow
def test_a_rotated_bundle(trained, tmp_path):
    profile, mesh = serving(MESH)
    pack(trained.run, "mxfp4", profile, mesh, tmp_path / "bundle", rotation=32)
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.rotation == 32
    loaded = bundle.load(profile, mesh)
    for spec in tensor_specs(trained.config):
        found = bundle.read_tensor(spec.name)
        if not isinstance(found, QTensor) or found.format != "mxfp4":
            continue
        assert found.rotation == 32
        wanted = quantize(leaf(trained.params, spec.name), "mxfp4", rotation=32)
        assert_same(found, wanted)
        np.testing.assert_array_equal(leaf(loaded, spec.name).dequantize(), wanted.dequantize())
    with pytest.raises(UserError, match="rotation is for the 4-bit formats, not int2"):
        pack(trained.run, "int2", profile, mesh, tmp_path / "other", rotation=32)
    with pytest.raises(UserError, match=r"128 rows .* over 4 devices in blocks of 64, as rotat"):
        pack(trained.run, "int4", *serving("tensor=4"), tmp_path / "other", rotation=64)
    assert not (tmp_path / "other").exists()


def test_version_1_bundles_load(trained, copy):
    """Version 1 had no rotations; its int4 bytes are those of today."""
    path = copy / "manifest.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    del body["digest"], body["rotation"]
    for entry in body["tensors"].values():
        del entry["rotation"]
    body["format_version"] = 1
    digest = blake3.blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(dict(body, digest=digest)), encoding="utf-8")
    bundle = Bundle.open(copy)
    for spec in tensor_specs(trained.config):
        assert_same(bundle.read_tensor(spec.name), expected(trained, spec, "int4"))


def test_words_that_do_not_divide_are_named(trained):
    with pytest.raises(UserError, match=r"128 rows along .* over 4 devices in blocks of 256"):
        PackedLayout.of(trained.config, "int1", *serving("tensor=4"))
    with pytest.raises(UserError, match=r"wk: shape .* int4_g128's group 128; int4_g64 fits"):
        PackedLayout.of(trained.config, "int4_g128", *serving("data=1"))


def test_groups_that_do_not_divide_are_named(trained):
    """wo contracts 128 values, four int4 groups; 96 values would be three, for four devices."""
    config = trained.config.replace(d_ff=96)
    profile, mesh = serving("tensor=4")
    with pytest.raises(UserError, match=r"blocks\.mlp\.w_down: 3 groups of 32 along 'ffw'"):
        PackedLayout.of(config, "int4", profile, mesh)


# Damage ---------------------------------------------------------------------------------------


def complaint(read: Callable[[], object]) -> str | None:
    """What the UserError of a reading says, if it raises one."""
    try:
        read()
    except UserError as error:
        return str(error)
    return None


def parts_of(path: Path) -> list[tuple[str, str]]:
    tensors = Manifest.read(path).tensors
    return [(name, kind) for name, entry in tensors.items() for kind in entry.parts]


def test_a_flipped_bit_in_any_tensor_names_it(copy):
    """In every part of every tensor, at its first, middle and last byte; the others still load."""
    bundle = Bundle.open(copy)
    assert len(parts_of(copy)) > 20
    for name, kind in parts_of(copy):
        part = bundle.manifest.tensors[name].parts[kind]
        file = copy / part.file
        intact = file.read_bytes()
        for offset in (0, part.nbytes // 2, part.nbytes - 1):
            data = bytearray(intact)
            data[part.offset + offset] ^= 1 << offset % 8
            file.write_bytes(data)
            for other in bundle.manifest.tensors:
                if other == name:
                    with pytest.raises(UserError, match=rf"{part.file} is damaged: tensor {name} "):
                        bundle.read_tensor(other)
                else:
                    bundle.read_tensor(other)
        file.write_bytes(intact)


def test_load_names_the_damaged_tensor(copy):
    part = Bundle.open(copy).manifest.tensors["blocks.mlp.w_up"].parts["scales"]
    data = bytearray((copy / part.file).read_bytes())
    data[part.offset] ^= 1
    (copy / part.file).write_bytes(data)
    with pytest.raises(UserError, match=r"damaged: tensor blocks\.mlp\.w_up"):
        Bundle.open(copy).load(*serving(MESH))


def test_truncated_and_missing_weights(copy):
    (file,) = copy.glob("*.safetensors")
    bundle = Bundle.open(copy)
    ends = {
        max(part.offset + part.nbytes for part in entry.parts.values()): name
        for name, entry in bundle.manifest.tensors.items()
    }
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    with pytest.raises(UserError, match=f"tensor {ends[len(intact)]} does not match"):
        bundle.read_tensor(ends[len(intact)])
    file.write_bytes(b"")
    with pytest.raises(UserError, match="tensor embed does not match"):
        bundle.read_tensor("embed")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: cannot read tensor embed: No such file"):
        bundle.read_tensor("embed")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"d_model": 64', '"d_model": 32'),
        ('"format": "int4"', '"format": "int8"'),
        ('"step": 30', '"step": 31'),
        ('"contract_axis": -2', '"contract_axis": -1'),
        ('"n_heads"', '"n_hands"'),
    ],
)
def test_an_edited_manifest(copy, old, new):
    path = copy / "manifest.json"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest\.json is damaged: its digest does not match"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'"digest"', b"{}", b'{"digest": 1}', b"\xff\xfe{}", b"null"],
)
def test_a_manifest_that_is_none(copy, content):
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Bundle.open(copy)


def test_every_byte_of_the_manifest_counts(copy):
    """A flipped bit anywhere is refused, or was in white space between values."""
    path = copy / "manifest.json"
    intact = path.read_bytes()
    for offset in range(0, len(intact), 61):
        data = bytearray(intact)
        data[offset] ^= 1 << offset % 7
        path.write_bytes(data)
        said = complaint(lambda: Manifest.read(copy))
        if said is None:
            assert intact[offset : offset + 1].isspace()
            assert json.loads(data) == json.loads(intact)
        else:
            assert "manifest.json" in said


def test_a_newer_version_and_a_missing_tensor(copy):
    path = copy / "manifest.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(dict(body, format_version=3)), encoding="utf-8")
    with pytest.raises(UserError, match="format version 3; this program reads 1 to 2; a newer"):
        Bundle.open(copy)
    for odd in (0, None, "two"):
        path.write_text(json.dumps(dict(body, format_version=odd)), encoding="utf-8")
        with pytest.raises(UserError, match=f"format version {odd}; this program reads 1 to 2$"):
            Bundle.open(copy)
    path.write_text(json.dumps(body), encoding="utf-8")
    bundle = Bundle.open(copy)
    del bundle.manifest.tensors["embed"]
    with pytest.raises(UserError, match="the manifest lacks tensor embed"):
        bundle.load(*serving(MESH))


def test_an_edited_tokenizer(copy):
    path = copy / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    # Two letters change places: still a tokenizer, of other text.
    swapped = text.replace('"A":', '"\u00e9":', 1).replace('"B":', '"A":', 1)
    assert swapped != text
    path.write_text(swapped, encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: its digest does not match"):
        _ = Bundle.open(copy).tokenizer
    for content in (b"", b"{}", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            _ = Bundle.open(copy).tokenizer
    path.unlink()
    with pytest.raises(UserError, match=r"damaged: tokenizer\.json is missing"):
        _ = Bundle.open(copy).tokenizer


def test_every_byte_of_the_tokenizer_counts(copy, trained):
    """A flipped bit is refused, or leaves what the tokenizer is (white space, an escape) alone."""
    path = copy / "tokenizer.json"
    intact = path.read_bytes()
    for offset in range(0, len(intact), 13):
        data = bytearray(intact)
        data[offset] ^= 1 << offset % 8
        path.write_bytes(data)
        said = complaint(lambda: Bundle.open(copy).tokenizer)
        if said is None:
            assert Bundle.open(copy).tokenizer == trained.tokenizer
        else:
            assert "tokenizer.json" in said


def test_no_bundle(tmp_path, trained):
    for path in (tmp_path, tmp_path / "nothing", trained.run):
        with pytest.raises(UserError, match=r"is not a bundle: it has no manifest\.json"):
            Bundle.open(path)


def test_the_chat_format_is_carried_into_the_bundle(trained, tmp_path):
    run, chat = tmp_path / "run", ChatFormat("{{ messages }}", "<s>", "</s>", (2,), True)
    shutil.copytree(trained.run, run)
    (run / CHAT).write_text(chat.to_json())
    pack(run, "bf16", *serving(MESH), tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").chat == chat
    for damage in (lambda file: file.write_text(ChatFormat(add_bos=True).to_json()), Path.unlink):
        file = tmp_path / "bundle" / CHAT
        file.chmod(0o644)
        damage(file)
        with pytest.raises(UserError, match=r"chat\.json is damaged"):
            _ = Bundle.open(tmp_path / "bundle").chat


def test_a_bundle_without_a_chat_format_has_the_empty_one(bundles):
    assert Bundle.open(bundles["int4"]).chat == ChatFormat()
