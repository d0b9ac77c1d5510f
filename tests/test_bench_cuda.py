"""benchmarks/bench_cuda.py where there is no GPU, and that cuda_limits.cu compiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_without_a_gpu_it_ends_with_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_cuda", "--quick"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "bench_cuda: no CUDA GPU was found\n"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_limits_compile(tmp_path, architecture):
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-Werror=all-warnings"]
    command += ["-I", ROOT / "csrc" / "cuda", "-cubin", ROOT / "benchmarks" / "cuda_limits.cu"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "cuda_limits.cubin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
