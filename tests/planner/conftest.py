"""What several of the planner's tests look at: computed once, never changed by a test."""

import pytest

from tpu_stack.cli.compare import Options, compare_profiles


@pytest.fixture(scope="session")
def nano():
    """The comparison of nano on eight emulated 8t with one 8i."""
    options = Options(model="nano", train="8t:8", train_mesh="fsdp=4,tensor=2", serve="8i:1")
    return compare_profiles(options)
