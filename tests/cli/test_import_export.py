"""`import`, `export` and `logits`: there and back bit for bit, and clear words on bad folders."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tpu_stack.checkpoint.store import ORIGINAL_FILES
from tpu_stack.cli import eval as eval_verb
from tpu_stack.cli import export, logits, pack
from tpu_stack.cli import train as train_verb
from tpu_stack.cli.text import TextOptions
from tpu_stack.data.chat_format import ChatFormat
from tpu_stack.errors import UserError
from tpu_stack.models.hf.safetensors_file import DTYPES, read_header, write_file
from tpu_stack.serving.bundle import Bundle
from tpu_stack.sharding.placement import PlacementOptions
from tpu_stack.training.config import TrainConfig

import_ = importlib.import_module("tpu_stack.cli.import")  # `import` is a word of Python

DATA = Path(__file__).parents[1] / "models" / "data" / "hf"
FAMILIES = ("llama", "qwen3", "gemma3")
ONE = PlacementOptions(devices=1)
DTYPES_OF_ROUND_TRIP = {"model.norm.weight": "F32", "model.embed_tokens.weight": "F16"}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, read by our reader (which is held to the library's below)."""
    return {
        name: stored.read()
        for file in sorted(folder.glob("*.safetensors"))
        for name, stored in read_header(file).items()
    }


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Changes a folder's tensors and writes them to one file."""
    held = tensors(folder)
    change(held)
    for file in folder.glob("model*"):
        file.unlink()
    known = {dtype: name for name, dtype in DTYPES.items()}
    described = {name: (known[array.dtype], array.shape) for name, array in held.items()}
    write_file(folder / "model.safetensors", described, iter(held.items()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Run folders imported from each family's folder."""
    out = tmp_path_factory.mktemp("runs")
    for family in FAMILIES:
        import_.run(import_.Options(DATA / family, out / family, place=ONE))
    return {family: out / family for family in FAMILIES}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A writable copy of the Llama folder, which has two weight files."""
    return shutil.copytree(DATA / "llama", tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_imported_comes_back_bit_for_bit(runs, family, tmp_path):
    export.run(export.Options(runs[family], tmp_path / "out", place=ONE))
    before, after = tensors(DATA / family), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert (array.dtype, array.shape) == (after[name].dtype, after[name].shape)
        assert array.tobytes() == after[name].tobytes(), name
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (DATA / family / name).read_bytes()


def test_every_tensor_keeps_the_dtype_it_had(folder, tmp_path):
    def change(held: dict[str, np.ndarray]) -> None:
        for name, dtype in DTYPES_OF_ROUND_TRIP.items():
            held[name] = held[name].astype(DTYPES[dtype])

    rewrite(folder, change)
    import_.run(import_.Options(folder, tmp_path / "run", place=ONE))
    export.run(export.Options(tmp_path / "run", tmp_path / "out", place=ONE))
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert all(after[n].tobytes() == a.tobytes() for n, a in before.items())
    assert after["model.norm.weight"].dtype == np.float32


def test_the_library_reads_what_is_written(runs, tmp_path):
    export.run(export.Options(runs["qwen3"], tmp_path / "out", dtype="float32", place=ONE))
    before = tensors(DATA / "qwen3")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(before)
        for name in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(name), before[name].astype(np.float32))


def test_a_model_without_a_kept_config_is_given_one(runs, tmp_path):
    """What `train` made has no Hugging Face config; what is derived reads back as the model."""
    for family in FAMILIES:
        run = shutil.copytree(runs[family], tmp_path / family)
        shutil.rmtree(run / ORIGINAL_FILES)
        export.run(export.Options(run, tmp_path / f"{family}-out", place=ONE))
        import_.run(
            import_.Options(tmp_path / f"{family}-out", tmp_path / f"{family}-2", place=ONE)
        )
        found, wanted = (
            json.loads((DATA / family / "config.json").read_text()),
            json.loads((tmp_path / f"{family}-out" / "config.json").read_text()),
        )
        assert found["architectures"] == wanted["architectures"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_checkpoint_are_those_of_transformers(runs, family, tmp_path):
    expected = np.load(DATA / family / "expected.npz")
    np.savez(tmp_path / "tokens.npz", tokens=expected["tokens"].astype(np.int64))
    asked = logits.Options(
        runs[family], tmp_path / "tokens.npz", tmp_path / "logits.npz", place=ONE
    )
    logits.run(asked)
    found = np.load(tmp_path / "logits.npz")["logits"]
    assert (found.dtype, found.shape) == (np.float32, expected["logits"].shape)
    largest = np.abs(expected["logits"]).max()
    assert np.abs(found - expected["logits"]).max() <= 2e-4 * largest


def test_an_imported_model_is_packed_and_evaluated(runs, tmp_path):
    pack.run(pack.Options(runs["llama"], tmp_path / "bundle", format="int8", place=ONE))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.chat.eos_token == "<|eot_id|>"
    assert bundle.tokenizer.encode("a b") == [66, 1, 67]
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    asked = eval_verb.Options(tmp_path / "bundle", (text,), seq_len=32, batch_size=8, place=ONE)
    assert np.isfinite(eval_verb.evaluate(asked)["loss"])


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", ("<|begin_of_text|>", "<|eot_id|>", (99, 98), True)),
        ("qwen3", (None, "<|im_end|>", (98, 97), False)),
        ("gemma3", ("<bos>", "<end_of_turn>", (99, 98), True)),
    ],
)
def test_the_chat_format_is_read(runs, family, wanted):
    chat = ChatFormat.read(runs[family])
    assert (chat.bos_token, chat.eos_token, chat.stop_tokens, chat.add_bos) == wanted
    assert chat.chat_template is not None
    assert "messages" in chat.chat_template


def edit(name: str, **changes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        body.update(changes)
        (folder / name).write_text(json.dumps(body))

    return apply


def tensor_edit(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def scribble(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


UP = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (edit("config.json", architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "not an object": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no size": (edit("config.json", hidden_size=None), "lacks hidden_size"),
    "size of words": (edit("config.json", hidden_size="32"), "hidden_size is '32'"),
    "infinite size": (edit("config.json", hidden_size=float("inf")), "hidden_size is inf"),
    "no number": (edit("config.json", rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "activations": (edit("config.json", hidden_act=["silu"]), "hidden_act"),
    "layers": (edit("config.json", layer_types=[{}, []]), "layer_types"),
    "no rope": (edit("config.json", rope_parameters=[1]), "rope_parameters"),
    "bias": (edit("config.json", attention_bias=True), "attention_bias"),
    "quantized": (edit("config.json", quantization_config={"bits": 4}), "quantization_config"),
    "rope": (edit("config.json", rope_parameters={"rope_type": "yarn"}), "yarn"),
    "missing": (tensor_edit(lambda held: held.pop(UP)), f"lacks {UP}"),
    "extra": (
        tensor_edit(lambda held: held.update(extra=held[UP])),
        "tensors that the model lacks: extra",
    ),
    "shape": (
        tensor_edit(lambda held: held.update({UP: held[UP][:-1]})),
        rf"{UP} \[31, 32\] \(the config gives \[32, 32\]\)",
    ),
    "a missing file": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        "lacks model-00002-of-00002",
    ),
    "cut short": (truncate, "does not fit its bytes"),
    "damaged": (scribble, "damaged"),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        "no .*safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_and_leaves_nothing(folder, tmp_path, name):
    damage, said = BAD[name]
    damage(folder)
    with pytest.raises(UserError, match=said):
        import_.run(import_.Options(folder, tmp_path / "run", place=ONE))
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_an_existing_folder_is_never_written_over(runs, tmp_path):
    with pytest.raises(UserError, match="exists"):
        import_.run(import_.Options(DATA / "llama", tmp_path, place=ONE))
    with pytest.raises(UserError, match="exists"):
        export.run(export.Options(runs["llama"], tmp_path, place=ONE))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"other": np.zeros((1, 2), int)}, "no array `tokens`"),
        ({"tokens": np.zeros((1, 2))}, "integers"),
        ({"tokens": np.zeros(2, int)}, "integers"),
        ({"tokens": np.full((1, 2), 104)}, "0 to 103"),
        ({"tokens": np.full((1, 2), -1)}, "0 to 103"),
    ],
)
def test_bad_tokens_are_refused(runs, tmp_path, arrays, said):
    np.savez(tmp_path / "tokens.npz", **arrays)
    asked = logits.Options(runs["llama"], tmp_path / "tokens.npz", tmp_path / "out.npz", place=ONE)
    with pytest.raises(UserError, match=said):
        logits.run(asked)
    assert not (tmp_path / "out.npz").exists()


def fine_tune(run: Path, out: Path, **more) -> train_verb.Options:
    text = out.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    short = TrainConfig(steps=2, batch_size=2, seq_len=16)
    return train_verb.Options(out, init=run, data=(text,), train=short, place=ONE, **more)


def test_an_imported_model_is_trained_on_and_exported_as_what_it_was(runs, tmp_path):
    assert train_verb.run(fine_tune(runs["llama"], tmp_path / "tuned")) == 0
    export.run(export.Options(tmp_path / "tuned", tmp_path / "hf", place=ONE))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (DATA / "llama" / name).read_bytes()
    before, after = tensors(DATA / "llama"), tensors(tmp_path / "hf")
    assert before.keys() == after.keys()
    moved = [np.abs(after[n].astype(np.float32) - before[n].astype(np.float32)) for n in before]
    assert 0 < max(move.max() for move in moved) < 0.1
    assert ChatFormat.read(tmp_path / "tuned") == ChatFormat.read(runs["llama"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model": "micro"}, "--model micro: --init .* brings its own"),
        ({"text": TextOptions(tokenizer="chars")}, "--text.tokenizer chars: --init .* brings"),
    ],
)
def test_a_model_is_not_named_twice(runs, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        train_verb.run(fine_tune(runs["llama"], tmp_path / "tuned", **more))
    assert not (tmp_path / "tuned").exists()
