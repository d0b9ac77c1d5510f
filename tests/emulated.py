"""The CUDA kernels without a GPU: their sources, compiled by the host's compiler, on the emulation
in cuda_on_cpu/, behind fusedrnn/cuda.py and on CPU tensors. No tests."""

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pybind11
import pytest
from helpers import with_build_tools

from fusedrnn import cuda, ops

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "cuda_on_cpu"


@functools.cache
def module():
    """The extension cuda_on_cpu, built if a source of it is newer."""
    configure = ["cmake", "-G", "Ninja", "-S", HERE / "cuda_on_cpu", "-B", BUILD]
    configure += ["-DCMAKE_BUILD_TYPE=", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of this run build it too
        for command in (configure, ["cmake", "--build", BUILD]):
            done = subprocess.run(
                command,
                env={**os.environ, "PATH": with_build_tools()},
                capture_output=True,
                text=True,
            )
            if done.returncode:  # not once more for each test
                pytest.exit(f"cuda_on_cpu cannot be built:\n{done.stdout}{done.stderr}", 1)
    (built,) = BUILD.glob("cuda_on_cpu.*.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", built)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


class _Layer:
    """CudaLayer, whose launches have run when a method returns; an emulation's error is raised."""

    def __init__(self, **shape):
        self._layer = module().CudaLayer(**shape)
        self.workspace_bytes = self._layer.workspace_bytes
        self.block_ctas = self._layer.block_ctas

    def _run(self, launch, **addresses):
        try:
            launch(**addresses)
        except RuntimeError as error:
            raise RuntimeError(module().error() or str(error)) from error
        if not module().synchronize():
            raise RuntimeError(module().error())
        _runs.append((launch.__name__, addresses.get("block")))

    def forward(self, **addresses):
        self._run(self._layer.forward, **addresses)

    def backward(self, **addresses):
        self._run(self._layer.backward, **addresses)

    def previous(self, **addresses):
        self._run(self._layer.previous, **addresses)


_runs = []  # (method, block) of each call inside emulated()


def _address(tensor):
    if tensor is None:
        return 0
    if tensor.numel():
        module().register(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor.data_ptr()


class _Kernels:
    """What ops.py takes for fusedrnn._C: CPU tensors go where CUDA tensors do."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def takes(self, cell, *layer):
        return cuda._fits(_NAMES[cell], *layer)

    def plan(self, *_):
        return None

    def forward(self, cell, save, threads, bf16, *layer_and_panels):
        name, layer = _NAMES[cell], layer_and_panels[:-1]
        return cuda.forward(name, save, *layer) if cuda._fits(name, *layer) else None

    def backward(self, cell, threads, bf16, *arguments):
        return cuda.backward(_NAMES[cell], *arguments)


_NAMES = {cell.number: name for name, cell in ops.CELLS.items()}


@contextmanager
def emulated(path="", tf32=False, seed=0, multiprocessors=132):
    """Inside, the kernels of ops.py are the CUDA ones, on CPU tensors. `path`: as FUSEDRNN_KERNEL.

    Yields a list that grows by (method of CudaLayer, whether by the block path) for each call.
    """
    module().clear_regions()
    module().reset(seed)
    module().set_device(9, 0, multiprocessors, 227 * 1024)
    _runs.clear()
    before = ops._C, cuda._C, cuda._address, cuda.forced, cuda._tf32
    empty = cuda._Layer.empty

    def poisoned(self, *shape, dtype=None):
        tensor = empty(self, *shape, dtype=dtype)
        tensor.untyped_storage().fill_(255)  # NaN: not what the same call left there before
        return tensor

    cuda._Layer.empty = poisoned
    ops._C, cuda._C = _Kernels(ops._C), _Module
    cuda._address, cuda.forced, cuda._tf32 = _address, path, lambda: tf32
    try:
        yield _runs
    finally:
        ops._C, cuda._C, cuda._address, cuda.forced, cuda._tf32 = before
        cuda._Layer.empty = empty
        module().clear_regions()
        module().reset(seed)
        module().set_device(9, 0, 132, 227 * 1024)


class _Module:
    CudaLayer = _Layer
