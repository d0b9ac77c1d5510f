"""The products on AMX's tiles, on a CPU without them: csrc/cpu/isa_amx*.cpp are compiled with
amx_on_cpu.h, linked with the other objects of this build, and the tests of bfloat16's products run
on that in a process of their own. With AMX, test_isa.py does so without an emulation.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import with_build_tools

from fusedrnn import ops

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / sys.implementation.cache_tag


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    """The path of the extension with emulated tiles."""
    if not ops.BF16_PRODUCTS:
        pytest.skip("no AVX512-BF16, of which the emulated kernels make use beside AMX")
    built = next(BUILD.glob("_C.*.so"), None)
    objects = "CMakeFiles/_C.dir/cpu"
    path = with_build_tools()
    environment = {**os.environ, "PATH": path}
    if built is None or not (BUILD / objects / "isa_amx_high.cpp.o").exists():
        pytest.skip("no object files of this build, or none for AMX")
    if shutil.which("ninja", path=path) is None:
        pytest.skip("no ninja, which knows how they were made")
    commands = subprocess.check_output(
        ["ninja", "-C", BUILD, "-t", "commands", built.name], text=True, env=environment
    ).splitlines()
    folder = tmp_path_factory.mktemp("amx")
    header = shlex.quote(str(HERE / "amx_on_cpu.h"))

    def run(command):
        subprocess.run(command, shell=True, check=True, cwd=BUILD, env=environment)

    link = commands[-1].replace(built.name, str(folder / built.name))
    for name in ("dispatch", "isa_amx", "isa_amx_high"):
        (compiles,) = (c for c in commands if c.endswith(f"/{name}.cpp"))
        run(f"{compiles.replace(objects, str(folder))} -O1 -include {header}")
        assert f"{objects}/{name}.cpp.o" in link
        link = link.replace(f"{objects}/{name}.cpp.o", str(folder / f"{name}.cpp.o"))
    run(link)
    return folder / built.name


RUN = """
import ctypes, importlib.util, sys
path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("fusedrnn._C", path)
sys.modules["fusedrnn._C"] = importlib.util.module_from_spec(spec)
import torch  # whose OpenMP runtime it takes
spec.loader.exec_module(sys.modules["fusedrnn._C"])
import fusedrnn, pytest
assert fusedrnn.isa() == "amx"
code = pytest.main(arguments)
print(ctypes.CDLL(path).emulated_tile_products(), "products of tiles")
sys.exit(code)
"""


OTHERS = (
    "sequence.py::test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch",
    "sequence.py::test_every_narrow_number_survives_the_way_to_float32_and_back",
    "explain.py::test_autocast",
    "explain.py::test_a_precision",
    "plain.py::test_follows_the_matmul_precision",
)


def test_products_of_tiles(extension):
    done = subprocess.run(
        [
            sys.executable, "-c", RUN, extension,
            "-q", "-x", "-p", "no:cacheprovider",
            HERE / "test_bf16_products.py", HERE / "test_prepacking.py",
            *(f"{HERE}/test_{name}" for name in OTHERS),
        ],
        env={**os.environ, "FUSEDRNN_ISA": "amx"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert int(done.stdout.split()[-4]) > 100_000


def test_they_are_taken_by_name_only(extension):
    code = RUN[: RUN.index("assert")] + "print(fusedrnn.isa())"
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDRNN_ISA"}
    done = subprocess.check_output(
        [sys.executable, "-c", code, extension], env=environment, text=True, cwd=HERE.parent
    )
    assert done == "avx512_bf16\n"
