"""From a Hugging Face folder or a GGUF file to a run folder, and back to a Hugging Face folder.

An imported run folder is a checkpoint of step 0 with parameters and no optimizer state, so `pack`,
`eval` and `train --init` read it as their own. The folder's small files are kept beside it in
`huggingface/`, so that `export` gives back what came in.

    import_model(Published.open(Path("Qwen3-0.6B")), Path("runs/qwen"), profile, mesh)
    export_folder(Path("runs/qwen"), Path("Qwen3-0.6B-again"), profile, mesh)
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tpu_stack.checkpoint.store import ORIGINAL_FILES, CheckpointStore
from tpu_stack.data.chat_format import CHAT, ChatFormat
from tpu_stack.errors import UserError
from tpu_stack.files import replacing_folder
from tpu_stack.models.abstract import tensor_specs
from tpu_stack.models.config import ModelConfig
from tpu_stack.models.hf.families import Family
from tpu_stack.models.hf.folder import CONFIG, read_json
from tpu_stack.models.hf.load import load_params
from tpu_stack.models.hf.read_config import read_config
from tpu_stack.models.hf.save import write_weights
from tpu_stack.models.hf.write_config import write_config
from tpu_stack.serving.pack import restore_for_serving
from tpu_stack.serving.published import TOKENIZER, Published
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import Profile

Listener = Callable[[str], None]


def import_model(
    published: Published,
    out: Path,
    profile: Profile,
    mesh: Mesh,
    listener: Listener = lambda name: None,
) -> None:
    """Writes the run folder `out` of an opened model, whole or not at all.

    The weights are float32, read into the layout of `profile` on `mesh` where it is of real
    devices. Raises UserError when `out` exists, or a tensor does not divide the mesh.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    model = published.model
    profile.check(tensor_specs(model.config))
    params = load_params(model, *_where_to_load(profile, mesh), listener)
    meta = {
        "model": model.config.to_dict(),
        "tokenizer": published.tokenizer.to_json(),
        "run": {"imported.architecture": model.family.architecture},
        "huggingface": {"dtypes": _by_dtype(published.tensor_dtypes)},
    }
    with replacing_folder(out) as partial:
        if published.chat != ChatFormat():
            (partial / CHAT).write_text(published.chat.to_json(), encoding="utf-8")
        (partial / ORIGINAL_FILES).mkdir()
        for file in published.small_files:
            shutil.copyfile(file, partial / ORIGINAL_FILES / file.name)
        with CheckpointStore(partial, in_background=False) as store:
            store.save(0, {"params": params}, meta)


def _where_to_load(profile: Profile, mesh: Mesh) -> tuple[Profile, Mesh]:
    """`mesh`, or one of a CPU's virtual devices: they share a memory, and the checkpoint is the
    same."""
    if mesh.devices.flat[0].platform != "cpu":
        return profile, mesh
    one = profile.emulate(1)
    return one, make_mesh(one.mesh, [mesh.devices.flat[0]])


def export_folder(
    run: Path,
    out: Path,
    profile: Profile,
    mesh: Mesh,
    *,
    step: int | None = None,
    dtype: str | None = None,
    listener: Listener = lambda name: None,
) -> dict[str, Any]:
    """Writes step `step` (default: the newest) of a run folder as the Hugging Face folder `out`.

    Every tensor gets the dtype it was imported in, or float32 where the model was trained here;
    `dtype` ("BF16", "F16", "F32") overrides both. Raises UserError when `out` exists, or no
    architecture known here expresses the model.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    with CheckpointStore(run, read_only=True) as store:
        step = store.latest() if step is None else step
        meta = store.meta(step)
        config = ModelConfig.from_dict(meta["model"])
        family, body = _architecture(run, config)
        params = restore_for_serving(store, step, config, profile, mesh)
    stored = {} if dtype else _by_name(meta.get("huggingface", {}).get("dtypes", {}))
    with replacing_folder(out) as partial:
        originals = run / ORIGINAL_FILES
        for file in sorted(originals.glob("*")) if originals.is_dir() else ():
            shutil.copyfile(file, partial / file.name)
        if body is not None:
            (partial / CONFIG).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        if not (partial / TOKENIZER).exists():
            (partial / TOKENIZER).write_text(meta["tokenizer"], encoding="utf-8")
        size = write_weights(partial, family, config, params, stored, dtype or "F32", listener)
    return {"architecture": family.architecture, "step": step, "bytes": size}


def _architecture(run: Path, config: ModelConfig) -> tuple[Family, dict[str, Any] | None]:
    """The family to export as, and a config.json where the original is missing or does not fit.

    The load-balance coefficient belongs to training and may have changed.
    """
    original = run / ORIGINAL_FILES / CONFIG
    if original.is_file():
        family, found = read_config(read_json(original), str(original))
        architectures = read_json(original).get("architectures")
        alone = family.architecture in (architectures or [family.architecture])
        if alone and found.replace(balance_loss=config.balance_loss) == config:
            return family, None
    return write_config(config)


def _by_dtype(dtypes: Mapping[str, str]) -> dict[str, list[str]]:
    """dtype -> names; most folders have one entry."""
    by_dtype: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        by_dtype.setdefault(dtype, []).append(name)
    return by_dtype


def _by_name(by_dtype: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: dtype for dtype, names in by_dtype.items() for name in names}
