"""Checkpoints come back exactly, on any mesh, or not at all: damage is never silent."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_stack.checkpoint.store import CheckpointStore
from tpu_stack.errors import UserError
from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import get_profile
from tpu_stack.training.config import OptimizerConfig
from tpu_stack.training.layout import StateLayout
from tpu_stack.training.optimizer import make_optimizer

# Orbax starts one coroutine per array and abandons the others when the first fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEP = 7
META = {"model": {"d_model": 64, "rate": 0.1}, "iterator": {"next_index": 123}, "text": "caf\u00e9"}


def tree_on(mesh: dict[str, int], seed: int) -> dict[str, Any]:
    """A small tree of several dtypes, split over `mesh`; the same values for the same seed.

    `w` is most of it, and each device's part of it is over the kilobyte up to which TensorStore
    keeps values in its index: files of data hold what is read, not what has been rewritten.
    """
    generator = np.random.default_rng(seed)
    devices = make_mesh(mesh)

    def placed(array: np.ndarray | np.generic, *spec) -> jax.Array:
        return jax.device_put(array, NamedSharding(devices, P(*spec)))

    return {
        "blocks": {
            "w": placed(generator.standard_normal((4, 64, 64)).astype(np.float32), None, "a", "b"),
            "half": placed(np.asarray(jax.numpy.arange(64, dtype="bfloat16")), "b"),
        },
        "norm": placed(generator.standard_normal(8).astype(np.float32)),
        "count": placed(np.int32(generator.integers(99))),
    }


def two_trees(mesh: dict[str, int], seed: int) -> dict[str, Any]:
    """Items as a training run has them."""
    return {"params": tree_on(mesh, seed), "optimizer": tree_on(mesh, 100 + seed)}


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


MESH = {"a": 2, "b": 4}
OTHERS = [{"a": 1, "b": 1}, {"a": 4, "b": 2}, {"a": 1, "b": 8}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 3 and 7."""
    folder = tmp_path_factory.mktemp("run")
    with CheckpointStore(folder) as store:
        for step in (3, STEP):
            store.save(step, two_trees(MESH, step), dict(META, at=step))
    return folder


@pytest.fixture(autouse=True)
def collect_what_orbax_abandoned():
    """Complaints about abandoned coroutines come with the collector: here, not in a later test."""
    yield
    gc.collect()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run to damage."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("mesh", [MESH, *OTHERS])
def test_restores_on_any_mesh(run, mesh):
    like = tree_on(mesh, STEP)
    with CheckpointStore(run, read_only=True) as store:
        assert store.steps == [3, STEP]
        assert store.latest() == STEP
        found = store.restore(STEP, "params", abstract(like))
        optimizer = store.restore(STEP, "optimizer", abstract(like))
    chex.assert_trees_all_equal(found, like)
    chex.assert_trees_all_equal(optimizer, tree_on(mesh, 100 + STEP))
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding
        assert leaf.dtype == wanted.dtype


def test_meta_comes_back(run):
    with CheckpointStore(run, read_only=True) as store:
        for step in (3, STEP):
            meta = store.meta(step)
            assert {name: meta[name] for name in META} == META
            assert (meta["step"], meta["at"]) == (step, step)
            assert set(meta["checksums"]) == {"params", "optimizer"}


def test_digest_is_of_the_values_only(run, tmp_path):
    """Saved from other meshes, at another step and with other meta: the same digest."""
    with CheckpointStore(run, read_only=True) as store:
        wanted, earlier = store.digest(STEP), store.digest(3)
    assert wanted != earlier
    for number, mesh in enumerate(OTHERS):
        with CheckpointStore(tmp_path / str(number)) as store:
            store.save(1, two_trees(mesh, STEP), {})
            store.wait()
            assert store.digest(1) == wanted


def test_digest_sees_one_bit_a_name_and_a_swap(run, tmp_path):
    params, optimizer = tree_on(MESH, STEP), tree_on(MESH, 100 + STEP)
    nudged = dict(params, norm=params["norm"].at[3].set(np.nextafter(params["norm"][3], 9)))
    renamed = {("norm2" if name == "norm" else name): leaf for name, leaf in params.items()}
    cases = [(nudged, optimizer), (renamed, optimizer), (optimizer, params)]
    with CheckpointStore(run, read_only=True) as store:
        digests = {store.digest(STEP)}
    for number, (first, second) in enumerate(cases):
        with CheckpointStore(tmp_path / str(number)) as store:
            store.save(1, {"params": first, "optimizer": second}, {})
            store.wait()
            digests.add(store.digest(1))
    assert len(digests) == 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_real_optimizer_states_survive(tmp_path, optimizer):
    """Optax's nested named tuples, empty ones and Muon's masked nodes, from one mesh to another."""
    config = ModelConfig(
        vocab_size=16, d_model=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=4, d_ff=16
    )
    rule = make_optimizer(OptimizerConfig(optimizer=optimizer), 1, config)

    def layout(mesh: str) -> StateLayout:
        profile = get_profile("8t").with_mesh(mesh)
        return StateLayout.of(config, rule, profile, make_mesh(profile.mesh))

    generator = np.random.default_rng(0)
    before, after = layout("fsdp=2,tensor=2").abstract, layout("data=2,fsdp=4").abstract
    state = jax.tree.map(
        lambda leaf: jax.device_put(
            (10 * generator.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding
        ),
        (before.params, before.opt_state),
    )
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"params": state[0], "optimizer": state[1]}, {})
        store.wait()
        params = store.restore(1, "params", after.params)
        opt_state = store.restore(1, "optimizer", after.opt_state)
    chex.assert_trees_all_equal((params, opt_state), state)
    assert jax.tree.structure(opt_state) == jax.tree.structure(after.opt_state)
    assert (optax.tree.get(opt_state, "ns_coeffs") is not None) == (optimizer == "muon")


def flip(offset: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(offset * (len(data) - 1))] ^= 0x01
        path.write_bytes(data)

    return damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": flip(0.0),
    "a quarter in": flip(0.25),
    "middle": flip(0.5),
    "three quarters in": flip(0.75),
    "truncated": truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


def read_everything(run: Path, like: Any) -> tuple[Any, Any, str, Any]:
    with CheckpointStore(run, read_only=True) as store:
        step = store.latest()
        return (
            store.restore(step, "params", like),
            store.restore(step, "optimizer", like),
            store.digest(step),
            store.meta(step),
        )


@pytest.mark.parametrize(
    "damage",
    [
        name if name in ("middle", "deleted") else pytest.param(name, marks=pytest.mark.slow)
        for name in DAMAGES
    ],
)
def test_damage_is_never_silent(run, tmp_path, damage):
    """Every file of a checkpoint, damaged in turn: either UserError, or exactly what was saved.

    Some files are redundant (what Orbax notes of shardings), so their loss may go unpunished; the
    files with the data and with meta must be missed, whatever part of them is hurt. Each damage is
    done to a copy of its own, because TensorStore keeps what it has read of a path.
    """
    like = abstract(tree_on(MESH, STEP))
    wanted = read_everything(run, like)
    folder = run / "checkpoints" / str(STEP)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    largest = {
        max((f for f in files if item in f.parts), key=lambda f: f.stat().st_size)
        for item in ("params", "optimizer")
    }
    assert len(files) > 20
    messages = {}
    for number, path in enumerate(files):
        hurt = tmp_path / f"run{number}"
        shutil.copytree(folder, hurt / "checkpoints" / str(STEP))
        DAMAGES[damage](hurt / path.relative_to(run))
        try:
            found = read_everything(hurt, like)
        except UserError as error:
            messages[path] = str(error).replace(str(hurt), "HURT")
        else:
            chex.assert_trees_all_equal(found, wanted)
    assert largest | {folder / "meta" / "metadata"} <= set(messages)
    assert all("HURT" in message and "\n" not in message for message in messages.values())


def test_every_byte_of_meta_counts(copy):
    """Also those that leave it valid JSON: a digit of a position, a letter of a name."""
    path = copy / "checkpoints" / str(STEP) / "meta" / "metadata"
    text = path.read_text(encoding="utf-8")
    assert json.loads(text)["iterator"]["next_index"] == 123
    for old, new in (("123", "124"), ("0.1", "0.2"), ('"text"', '"test"'), ('"at": 7', '"at": 8')):
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        with (
            CheckpointStore(copy, read_only=True) as store,
            pytest.raises(UserError, match=rf"checkpoints/{STEP} is damaged: meta"),
        ):
            store.meta(STEP)


def test_a_wrong_checksum_names_the_tensor(copy, monkeypatch):
    """Data that reads well and differs from what was saved, as a faulty memory would leave it."""
    from tpu_stack.checkpoint import store as module

    real = module.damaged
    like = abstract(tree_on(MESH, STEP))

    def hit(tree: Any, expected: dict[str, str]) -> list[str]:
        w = tree["blocks"]["w"]
        return real({**tree, "blocks": {**tree["blocks"], "w": w.at[1, 2, 3].add(1e-6)}}, expected)

    monkeypatch.setattr(module, "damaged", hit)
    with (
        CheckpointStore(copy, read_only=True) as store,
        pytest.raises(UserError, match=rf"checkpoints/{STEP} is damaged: params blocks\.w"),
    ):
        store.restore(STEP, "params", like)


def test_another_model_is_refused(run):
    like = abstract(tree_on(MESH, STEP))
    renamed = {("gain" if name == "norm" else name): leaf for name, leaf in like.items()}
    device = like["norm"].sharding
    longer = dict(like, norm=jax.ShapeDtypeStruct((9,), np.float32, sharding=device))
    with CheckpointStore(run, read_only=True) as store:
        with pytest.raises(UserError, match=r"params differ from the model: \['gain', 'norm'\]"):
            store.restore(STEP, "params", renamed)
        with pytest.raises(UserError, match="params"):
            store.restore(STEP, "params", longer)


def test_missing_steps_and_folders(run, tmp_path):
    with CheckpointStore(run, read_only=True) as store:
        for read in (store.meta, store.digest, lambda step: store.restore(step, "params", {})):
            with pytest.raises(UserError, match=r"no checkpoint of step 5; it has \[3, 7\]"):
                read(5)
    with pytest.raises(UserError, match="holds no checkpoints; give the --out folder"):
        CheckpointStore(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match="holds no checkpoints"):
        CheckpointStore(file, read_only=True)
    with pytest.raises(UserError):
        CheckpointStore(file / "run")
    with (
        CheckpointStore(tmp_path / "fresh") as store,
        pytest.raises(UserError, match="holds no complete checkpoint"),
    ):
        store.latest()


def test_reading_writes_nothing(copy):
    def names() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in copy.rglob("*")}

    before = names()
    read_everything(copy, abstract(tree_on(MESH, STEP)))
    assert names() == before


def test_the_newest_two_are_kept(tmp_path):
    tree = tree_on({"a": 1, "b": 1}, 0)
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 3):
            store.save(step, {"params": tree}, {})
        store.wait()
        assert store.steps == [2, 3]


def test_any_items(tmp_path):
    """Trees of any name and kind: tuples, a key, numpy, one without leaves; each by itself."""
    items = {
        "teacher": (tree_on(MESH, 1), {"ema": np.arange(6, dtype=np.float32)}),
        "replay": {
            "rewards": jax.numpy.ones((3, 2, 2), jax.numpy.bfloat16),
            "seen": np.bool_(True),
        },
        "nothing": optax.sgd(0.1).init({"w": np.zeros(2)}),
        "params": tree_on(MESH, STEP),
    }
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def like(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)

    with CheckpointStore(tmp_path / "first") as store:
        store.save(1, items, {"note": "x"})
        store.wait()
        assert store.items(1) == ["nothing", "params", "replay", "teacher"]
        for name, tree in items.items():
            found = store.restore(1, name, like(tree))
            chex.assert_trees_all_equal(found, tree)
            assert jax.tree.structure(found) == jax.tree.structure(tree)
        with pytest.raises(
            UserError, match=r"holds no 'optimizer'; it holds \['nothing', 'params'"
        ):
            store.restore(1, "optimizer", {})
        whole = store.digest(1)
    changed = items | {"teacher": (items["teacher"][0], {"ema": np.arange(6)[::-1].astype("f4")})}
    for number, (other, same) in enumerate(
        [(dict(reversed(items.items())), True), (changed, False)]
    ):
        with CheckpointStore(tmp_path / str(number)) as store:
            store.save(2, other, {})
            store.wait()
            assert (store.digest(2) == whole) == same


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ({"meta": {}}, "an item cannot be called 'meta'"),
        ({"params": {"a": {"w": np.zeros(2, np.int64)}}}, r"a\.w is int64; .* 1, 2 or 4 bytes"),
        ({"params": {"w": jax.numpy.zeros(4, "int4")}}, "w is int4"),
        ({"params": {"w": 3.0}}, "w is float"),
    ],
)
def test_items_that_cannot_be_saved(tmp_path, items, said):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(UserError, match=said):
            store.save(1, items, {})
        assert store.steps == []
