"""Fixtures that several test files use, and who may run beside whom. No tests."""

import contextlib
import fcntl

import pytest

from benchmarks.common import threads


@pytest.fixture(scope="module")
def one_thread():
    """For files in which nothing is large enough for more."""
    with threads(1):
        yield


@contextlib.contextmanager
def locked(path, how):
    with open(path, "w") as file:
        fcntl.flock(file, how)
        yield


@pytest.fixture(autouse=True)
def _beside_others(request, tmp_path_factory):
    """Under pytest-xdist, a test that is marked `alone` runs while no other worker runs any."""
    if not hasattr(request.config, "workerinput"):
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent  # the workers' common one
    alone = request.node.get_closest_marker("alone")
    with contextlib.ExitStack() as running:
        with locked(folder / "next", fcntl.LOCK_EX):  # what waits holds up those that come later
            running.enter_context(
                locked(folder / "running", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            )
        yield
