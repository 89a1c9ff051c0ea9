"""Bad input: one line on standard error that names the value, status 2, nothing written."""

from pathlib import Path

import pytest

from tpu_stack.cli.main import main
from tpu_stack.data.sources import Document
from tpu_stack.data.tokenizer import build_tokenizer
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.presets import get_preset
from tpu_stack.serving.bundle import write_bundle

TEXT = "the quick brown fox jumps over the lazy dog. " * 200


def fails(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Runs a verb that must be refused; returns its one line, which must name `words`."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tpu-stack: error: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture
def plays(tmp_path: Path) -> Path:
    path = tmp_path / "plays.txt"
    path.write_text(TEXT)
    return path


def test_an_unknown_verb_names_the_nearest(capsys):
    fails(["trian"], capsys, "'trian'", "train")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "--out", "x", "--train.step", "3"], ["--train.step", "--train.steps"]),
        (["train", "--out", "x", "--modle", "nano"], ["--modle", "--model"]),
        (
            ["train", "--out", "x", "--train.steps", "ten"],
            ["'ten'; it must be a whole"],
        ),
        (["plan", "compile", "--timeout", "ten"], ["--timeout is 'ten'; it must be a number"]),
        (["plan", "compile", "--batch-size", "x"], ["--batch-size is 'x'", "a whole number"]),
        (["plan", "compile", "--program", "tran"], ["--program is 'tran'", "train, prefill"]),
        (["train", "--out", "x", "--train.steps", "0"], ["steps is 0", "at least 1"]),
        (["train"], ["--out"]),
        (["train", "--out", "x", "--model", "nanno"], ["'nanno'", "'nano'"]),
        (["train", "--out", "x", "--profile", "9t"], ["'9t'", "8t"]),
        (["train", "--out", "x", "--profile", "8t:4x4"], ["'4x4'", "3D torus"]),
        (["train", "--out", "x", "--mesh", "fsdp=two"], ["fsdp=two", "positive"]),
        (["train", "--out", "x", "--mesh", "model=2"], ["'model'", "fsdp"]),
        (
            ["train", "--out", "x", "--train.schedule", "step"],
            ["is 'step'", "cosine"],
        ),
        (["profiles", "8i:8", "--model", "llama3_8b", "--mesh", "tensor=16"], ["kv_heads", "8"]),
        (["profiles", "8i:8", "--model", "llama3_8b", "--format", "int3"], ["'int3'"]),
        (["chips", "v7"], ["'v7'"]),
    ],
)
def test_a_wrong_option_is_named(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(argv, capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_corpus_is_named(capsys, tmp_path):
    out = tmp_path / "run"
    fails(["train", "--out", str(out), "--data", str(tmp_path / "no.txt")], capsys, "no.txt")
    assert not out.exists()


def test_an_empty_corpus_is_refused(capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    fails(["train", "--out", str(tmp_path / "run"), "--data", str(empty)], capsys, "empty")
    assert not (tmp_path / "run").exists()


def test_a_corpus_shorter_than_a_row_is_refused_with_the_sizes(capsys, tmp_path, plays):
    argv = ["train", "--out", str(tmp_path / "run"), "--data", str(plays)]
    fails([*argv, "--train.seq-len", "100000"], capsys, "100000", "needs 100001")


def test_a_mesh_that_does_not_divide_names_tensor_axis_and_a_mesh_that_does(
    capsys, tmp_path, plays
):
    argv = ["train", "--out", str(tmp_path / "run"), "--data", str(plays)]
    message = fails([*argv, "--mesh", "tensor=8"], capsys, "attention.wk", "kv_heads", "tensor=8")
    assert "nearest that works: tensor=2" in message


def test_a_batch_that_does_not_divide_names_a_size_that_does(capsys, tmp_path, plays):
    argv = ["train", "--out", str(tmp_path / "run"), "--data", str(plays), "--mesh", "fsdp=8"]
    fails([*argv, "--train.batch-size", "12", "--train.seq-len", "16",
           "--text.tokenizer", "bpe:300"], capsys, "12", "nearest that works: 16")  # fmt: skip


def test_a_chip_without_facts_cannot_be_compared(capsys):
    fails(["compare", "--model", "nano", "--train", "cpu:8", "--serve", "8i:4"], capsys, "cpu")


@pytest.mark.parametrize("verb", [["pack", "--out", "b"], ["checkpoint", "digest"]])
def test_a_folder_without_checkpoints_is_named(verb, capsys, tmp_path):
    fails([*verb, str(tmp_path)], capsys, str(tmp_path), "checkpoint")


@pytest.mark.parametrize("verb", [["eval"], ["generate", "--prompt", "x"]])
def test_a_folder_that_is_no_bundle_is_named(verb, capsys, tmp_path):
    fails([*verb, str(tmp_path)], capsys, str(tmp_path), "bundle")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small float bundle of zeros: enough to be opened, verified and refused."""
    import ml_dtypes
    import numpy as np

    tokenizer = build_tokenizer("chars", [Document(TEXT, "plays")])
    config = get_preset("nano").replace(vocab_size=64, n_layers=1)
    tensors = ((s.name, np.zeros(s.shape, ml_dtypes.bfloat16)) for s in tensor_specs(config))
    write_bundle(tmp_path / "bundle", config, "bf16", tokenizer, {}, tensors)
    return tmp_path / "bundle"


def test_a_damaged_bundle_names_the_tensor(capsys, bundle):
    weights = bundle / "weights-00001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    message = fails(["generate", str(bundle), "--prompt", "the"], capsys, "damaged", "tensor")
    assert any(spec.name in message for spec in tensor_specs(get_preset("nano")))


def test_an_edited_manifest_is_refused(capsys, bundle):
    manifest = bundle / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"n_heads": 4', '"n_heads": 2'))
    fails(["generate", str(bundle), "--prompt", "the"], capsys, "manifest.json", "digest")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-tokens", "0"),
        ("--max-tokens", "100000"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-k", "-3"),
        ("--seed", "-1"),
    ],
)
def test_sampling_options_out_of_range_are_named(option, value, capsys, bundle):
    fails(["generate", str(bundle), "--prompt", "the", option, value], capsys, option, value)


def test_an_empty_prompt_is_refused(capsys, bundle):
    fails(["generate", str(bundle), "--prompt", ""], capsys, "prompt", "empty")


def test_an_existing_bundle_is_never_overwritten(capsys, bundle):
    before = sorted((file.name, file.read_bytes()) for file in bundle.iterdir())
    tokenizer = build_tokenizer("chars", [Document(TEXT, "plays")])
    from tpu_stack.errors import UserError

    with pytest.raises(UserError, match="exists"):
        write_bundle(bundle, get_preset("nano"), "bf16", tokenizer, {}, [])
    assert before == sorted((file.name, file.read_bytes()) for file in bundle.iterdir())
