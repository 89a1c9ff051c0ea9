"""The library: README's example runs as it stands, and bad settings are refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpu_stack as ts
from tpu_stack.data.pipeline import DataConfig
from tpu_stack.errors import UserError
from tpu_stack.serving.engine_options import EngineOptions
from tpu_stack.sharding.placement import PlacementOptions

ROOT = Path(__file__).parent.parent


def readme_example() -> str:
    """The one Python block of README.md."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return block


def test_readme_example(tmp_path):
    """In a process and a folder of its own, as a reader runs it."""
    shutil.copy(ROOT / "README.md", tmp_path)
    code = readme_example()
    assert len(code.splitlines()) <= 14
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(8, " in done.stdout
    assert "generation 1" in done.stdout
    assert "projected" in done.stdout
    assert (tmp_path / "runs" / "a-int4" / "manifest.json").is_file()


def test_names_are_offered_and_no_others():
    assert set(ts.__all__) < set(dir(ts))
    assert all(callable(getattr(ts, name)) for name in ts.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = ts.trian


def test_importing_the_package_imports_no_jax():
    code = "import sys, tpu_stack; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match="no setting 'learning_rat'; did you mean learning_rate"):
        ts.train("nano", learning_rat=1e-3)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing does not exist|is not a bundle"):
        ts.open(tmp_path / "missing")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ts.plan("nano", "v5e:2x2", program="decode"), "program is 'decode'"),
        (lambda: ts.plan("nano", "v5e:2x2", batchsize=3), "did you mean batch_size"),
        (lambda: ts.compare("nano", formatt="int8"), "did you mean format"),
        (lambda: ts.train("nano", resume=True), "out is None"),
    ],
)
def test_wrong_arguments_are_one_clear_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of other tokenizers, and a rotated bundle of the first."""
    folder = tmp_path_factory.mktemp("runs")
    sizes: Any = {"steps": 1, "batch_size": 8, "seq_len": 32}
    eight = PlacementOptions(devices=8)
    for name, vocabulary in (("a", "bpe:300"), ("b", "bpe:310")):
        text = DataConfig(tokenizer=vocabulary)
        data = str(ROOT / "CONTRIBUTING.md")
        ts.train("nano", data=data, out=folder / name, text=text, place=eight, **sizes)
    ts.pack(folder / "a", "int4", out=folder / "rotated", rotation=64)
    return folder


def test_new_weights_keep_the_rotation_and_must_be_of_the_same_model(runs):
    engine = EngineOptions(slots=1, max_length=32)
    with ts.open(runs / "rotated", engine=engine) as model:
        before = model.score([[1, 2, 3, 4]]).logprobs
        assert model.load(runs / "a").result() == 1
        np.testing.assert_array_equal(model.score([[1, 2, 3, 4]]).logprobs, before)
        with pytest.raises(UserError, match=r"another (config|tokenizer)"):
            model.load(runs / "b")
        with pytest.raises(UserError, match="finish or restart"):
            model.load(runs / "a", "later")  # pyright: ignore[reportArgumentType]
        with pytest.raises(UserError, match="did you mean temperature"):
            model.generate("def ", temprature=1)
        with pytest.raises(UserError, match="samples is 0"):
            model.rollout("def ", samples=0)
        assert model.rollout("def ", samples=2, max_tokens=3).tokens.shape == (2, 3)
