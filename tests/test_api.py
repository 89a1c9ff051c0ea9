"""The library: README's example runs as it stands, and bad settings are refused."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tpu_stack as ts
from tpu_stack.errors import UserError

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
