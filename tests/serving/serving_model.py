"""The model of these tests, small, with everything that splits, and the profiles that serve it."""

import dataclasses

from jax.sharding import Mesh

from tpu_stack.models.config import ModelConfig
from tpu_stack.sharding.mesh import make_mesh
from tpu_stack.sharding.profiles import Precision, Profile, get_profile

# Every matrix has int4 groups to spare for four devices, and more query than key heads.
MODEL = ModelConfig(
    vocab_size=64,
    d_model=64,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    head_dim=16,
    d_ff=128,
    qk_norm=True,
    tie_embeddings=False,
)
STEP = 30


def serving(mesh: str, *, float32: bool = False) -> tuple[Profile, Mesh]:
    """The 8i profile on `mesh`; with float32 activations and cache where tokens are compared."""
    profile = get_profile("8i").with_mesh(mesh)
    if float32:
        profile = dataclasses.replace(profile, precision=Precision("float32", "float32", "float32"))
    return profile, make_mesh(profile.mesh)
