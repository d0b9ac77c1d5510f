"""Fixtures that several test files use. No tests."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """For files in which nothing is large enough for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
