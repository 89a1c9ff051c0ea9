"""Shared setup: every test sees eight CPU devices, as the emulated meshes need."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM at full optimisation takes half of the suite's time and changes no result beyond rounding.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
