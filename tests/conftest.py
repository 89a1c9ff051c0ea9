"""Shared setup: every test sees eight CPU devices, as the emulated meshes need."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
