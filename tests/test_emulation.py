"""The emulation of CUDA on a CPU (cuda_on_cpu/), and that what it stands for is what nvcc takes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests" / "cuda_on_cpu"
CXX = os.environ.get("CXX", "g++")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
@pytest.mark.parametrize("flag", ["-O0", "-O2"])
def test_emulation(tmp_path, flag):
    sources = [HERE / "test_emulation.cpp", HERE / "emulation.cpp"]
    flags = ["-std=c++17", flag, "-Wall", "-Wextra", "-Werror", "-I", HERE, "-I", ROOT / "csrc"]
    run(CXX, *flags, *sources, "-o", tmp_path / "test_emulation", "-ldl")
    run(tmp_path / "test_emulation")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_every_function_compiles_with_nvcc(tmp_path, architecture):
    flags = ["-std=c++17", f"-arch={architecture}", "-Werror=all-warnings", "-I", ROOT / "csrc"]
    output = tmp_path / "every_function.cubin"
    run("nvcc", *flags, "-cubin", HERE / "every_function.cu", "-o", output)


@pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no {CXX}")
def test_every_function_is_emulated(tmp_path):
    flags = ["-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-I", HERE, "-I", ROOT / "csrc"]
    run(CXX, *flags, "-c", HERE / "every_function.cu", "-o", tmp_path / "every_function.o")
