"""The wheel built from the sdist works outside the repository, data files and kernels included.

`tpu_stack/kernels` is a symbolic link: a build backend that dropped it would pass every other test.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "tpu_stack", "kernels")


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The sdist and the wheel that `python -m build` makes from it, without a network.

    Built from a copy, for setuptools leaves `build/` and `*.egg-info` in the tree it builds.
    """
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "repository"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), ".")
    run(*build, cwd=copy)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """The wheel unzipped: what `pip install` would put into site-packages."""
    (wheel,) = dist.glob("*.whl")
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture
def outside(installed, tmp_path):
    """`outside(*arguments)` runs Python elsewhere, with the unzipped wheel first on its path."""

    def call(*arguments: str) -> str:
        environment = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
        return run(sys.executable, *arguments, cwd=tmp_path, **environment)

    return call


def packaged_files() -> set[str]:
    """Every file of the package that a wheel must hold, by its path in site-packages."""
    wanted = {".py", ".json", ".jinja", ".typed"}
    package = ROOT / "tpu_stack"
    return {
        path.relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(package, followlinks=True)
        for path in (Path(folder) / name for name in names)
        if path.suffix in wanted and "__pycache__" not in path.parts
    }


def test_wheel_holds_every_file(installed):
    found = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    wanted = packaged_files()
    assert "tpu_stack/kernels/quantized_matmul/tiles.json" in wanted
    assert "tpu_stack/py.typed" in wanted
    assert wanted <= found
    assert not [name for name in found if name.startswith(("tests", "experiments", "kernels/"))]


def test_sdist_builds_by_itself(dist):
    """The sdist has what its wheel needs: metadata files, and kernels as files or as a link."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tpu_stack/py.typed"} <= names
    assert names & {
        "kernels/quantized_matmul/tiles.json",
        "tpu_stack/kernels/quantized_matmul/tiles.json",
    }


def test_kernel_runs_from_the_wheel(outside, installed):
    """The package found is the wheel's, and its kernel reads its tiles and multiplies."""
    program = """
import numpy as np
import jax.numpy as jnp
import tpu_stack.kernels.quantized_matmul as kernel
x, values = jnp.ones((8, 128), jnp.float32), jnp.ones((128, 128), jnp.int8)
y = kernel.quantized_matmul(x, values, jnp.ones((1, 1, 128), jnp.float32), out_dtype=jnp.float32)
np.testing.assert_array_equal(y, np.full((8, 128), 128.0))
print(kernel.__file__)
"""
    place = outside("-c", program).strip()
    assert Path(place).is_relative_to(installed)


def test_command_line_runs_from_the_wheel(outside):
    text = outside("-m", "tpu_stack.cli.main", "--help")
    assert "usage: tpu-stack VERB" in text
    assert "tpu-stack 0." in outside("-m", "tpu_stack.cli.main", "--version")
    assert "TPU 8i" in outside("-m", "tpu_stack.cli.main", "chips", "8i")


def test_metadata(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert "Name: tpu-stack" in text
    assert "Requires-Python: >=3.12" in text
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "tpu-stack = tpu_stack.cli.main:entry_point" in entry.read_text(encoding="utf-8")
