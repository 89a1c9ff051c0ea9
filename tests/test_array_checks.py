"""The checks that other tests lean on are on: array annotations hold, ranks do not grow."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from array_checks import annotated_modules

from tpu_stack.kernels.grouped_matmul.metadata import expert_of_rows
from tpu_stack.models.rope import rope_tables
from tpu_stack.training.losses import negative_log_likelihood


def test_dtype_rank_and_sizes_are_checked():
    positions = np.zeros((2, 3), np.int32)
    tables: Any = rope_tables  # pyright would refuse what is meant to be refused at run time
    tables(positions, np.ones(4))  # numpy's arrays are as good as jax's
    with pytest.raises(jaxtyping.TypeCheckError, match="positions_BT"):
        tables(jnp.zeros((2, 3)), np.ones(4))
    with pytest.raises(jaxtyping.TypeCheckError, match="positions_BT"):
        tables(positions[0], np.ones(4))
    with pytest.raises(jaxtyping.TypeCheckError, match="targets_BT"):
        negative_log_likelihood(jnp.zeros((2, 3, 7)), jnp.zeros((2, 4), jnp.int32))


def test_kernels_and_traced_functions_are_checked_too():
    with pytest.raises(jaxtyping.TypeCheckError, match="group_sizes"):
        jax.eval_shape(lambda sizes: expert_of_rows(sizes, 4), jnp.zeros((3, 2), jnp.int32))


def test_modules_are_found_by_their_import():
    found = annotated_modules()
    assert {"tpu_stack.models.rope", "tpu_stack.kernels.grouped_matmul.metadata"} <= found
    assert "tpu_stack.errors" not in found


def test_no_axis_is_added_in_silence():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))
