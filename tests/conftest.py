"""Fixtures that several test files use, and who may run beside whom. No tests."""

import contextlib
import fcntl
from pathlib import Path

import pytest

from benchmarks.common import threads
from fusedrnn import modules


@pytest.fixture(scope="module")
def one_thread():
    """For files in which nothing is large enough for more."""
    with threads(1):
        yield


@pytest.fixture
def kernels_only(monkeypatch):
    """No bfloat16 call goes to torch for being faster there, as sequences do on some CPUs."""
    monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", False)


@contextlib.contextmanager
def locked(name, how):
    """A lock between processes, on a file of this folder."""
    with open(Path(__file__).with_name(name)) as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for children too, which have the file open


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Under pytest-xdist, a test that is marked `alone` runs while no other worker runs any.

    Nor a fixture: this is around them.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as running:
        with locked("helpers.py", fcntl.LOCK_EX):  # who waits in here holds up those after it
            running.enter_context(locked("conftest.py", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)
