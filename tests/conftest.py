"""Shared setup: every test sees eight CPU devices, as the emulated meshes need.

Ranks are promoted by nobody but us, and array annotations hold: `array_checks`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM at full optimisation takes half of the suite's time and changes no result beyond rounding.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
# [B, T] + [T] is as often a mistake as it is meant: code says which axis is new. In the
# environment, so that the child processes of tests hold to it too.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

import array_checks
import jax

array_checks.install()
jax.config.update("jax_num_cpu_devices", 8)
