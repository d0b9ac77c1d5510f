"""More threads than this machine has cores, of which the kernels take no more than there are: the
tests of equal bits again, in a process to which OpenMP counts eight cores.
"""

import os
import shlex
import subprocess
from pathlib import Path

from helpers import python

from fusedrnn import ops

TESTS = Path(__file__).parent


def test_the_same_bits_on_eight_cores(tmp_path):
    source, library = tmp_path / "cores.cpp", tmp_path / "cores.so"
    source.write_text('extern "C" int omp_get_num_procs() { return 8; }\n')
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    preloaded = [os.environ.get("LD_PRELOAD"), str(library)]
    names = ["sequence", "options", *(["bf16_products"] if ops.BF16_PRODUCTS else [])]
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
        "-k", "thread_count or number_of_threads or both_split",
        *(TESTS / f"test_{name}.py" for name in names),
        LD_PRELOAD=" ".join(filter(None, preloaded)),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
