"""Fixtures that several test files use. No tests."""

import pytest

from benchmarks.common import threads


@pytest.fixture(scope="module")
def one_thread():
    """For files in which nothing is large enough for more."""
    with threads(1):
        yield
