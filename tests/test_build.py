"""The build and what it leaves: metadata, setup.py's messages, and the libraries that the extension
pulls into a process. Not the kernels."""

import os
import re
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import with_build_tools

import fusedrnn

ROOT = Path(__file__).resolve().parents[1]


def run_python(code, *arguments, **options):
    """A fresh Python at the top of the repository; returns the finished process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def libraries_after(code):
    """The paths of the shared libraries that a fresh process holds after running `code`."""
    done = run_python(code + "\nprint(open('/proc/self/maps').read())")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"\S+\.so\S*", done.stdout))


def build_ext(**environment):
    """setup.py's build with this environment and no other; returns the finished process."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_version_is_that_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    written = re.findall(r'^version = "(.+)"$', text, re.MULTILINE)
    assert written == [version("fusedrnn")] == [fusedrnn.__version__]


def test_metadata_is_made_without_torch(tmp_path):
    pytest.importorskip("setuptools")
    done = run_python(
        "import sys; sys.modules['torch'] = None\n"  # so that an import of torch raises
        "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare\n"
        "prepare(sys.argv[1])",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("METADATA")
    metadata = HeaderParser().parsestr(path.read_text())
    assert metadata["Version"] == fusedrnn.__version__
    assert "torch>=2.7" in metadata.get_all("Requires-Dist")
    (requires,) = re.findall(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert "pybind11" in requires
    assert "torch" not in requires


def test_missing_compiler_is_said_once_and_clearly():
    done = build_ext(CXX="/nonexistent", PATH="")
    assert done.returncode == 1
    assert done.stderr.count("needs a C++ compiler, gcc 12 or newer or clang 14 or newer") == 1
    assert "Looked for: /nonexistent: not found." in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_compiler_at_all_names_those_looked_for():
    done = build_ext(PATH="")
    assert done.returncode == 1
    assert "c++: not found; g++: not found; clang++: not found" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("macros", "seen"),
    [
        ("#define __GNUC__ 11", "gcc 11"),
        ("#define __GNUC__ 4\n#define __clang_major__ 13", "clang 13"),
        ("", "not a C++ compiler"),
    ],
)
def test_old_compiler_is_named_with_its_version(tmp_path, macros, seen):
    compiler = tmp_path / "old-c++"
    compiler.write_text(f"#!/bin/sh\necho '{macros}'\n")
    compiler.chmod(0o755)
    done = build_ext(CXX=str(compiler), PATH=os.environ["PATH"])
    assert done.returncode == 1
    assert f"Looked for: {compiler}: {seen}." in done.stderr
    assert "Traceback" not in done.stderr


def test_extension_loads_without_torch():
    loaded = libraries_after(
        "import sys; sys.modules['torch'] = None\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('fusedrnn._C', {fusedrnn._C.__file__!r})\n"
        "spec.loader.exec_module(module_from_spec(spec))"
    )
    assert fusedrnn._C.__file__ in loaded
    assert not [path for path in loaded if "torch" in Path(path).name]


def test_import_leaves_dynamo_alone():
    """It takes as long to import as all else of torch."""
    source = "import sys, fusedrnn; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", source], check=True)


def test_one_openmp_runtime_is_loaded():
    loaded = libraries_after("import fusedrnn")
    runtimes = [path for path in loaded if re.match(r"lib(gomp|i?omp5?)\b", Path(path).name)]
    assert len(runtimes) == 1
    assert Path(runtimes[0]).name.startswith("libgomp")


@pytest.mark.parametrize(
    "isa", ["generic", "neon_bf16", "avx2", "avx512", "avx512_bf16", "amx", "amx_high"]
)
def test_isa_files_offer_no_inline_function(isa):
    """A weak function there could be the copy that the linker keeps, on any CPU.

    Skipped where the package was not built in this checkout.
    """
    objects = list(ROOT.glob(f"build/{sys.implementation.cache_tag}/**/isa_{isa}.cpp.o"))
    if not objects:
        pytest.skip("no object files of this build")
    done = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True)
    assert " T " in done.stdout
    assert not re.findall(r"^\S* W .*$", done.stdout, re.MULTILINE)


# CUDA: what nvcc made ----------------------------------------------------------------------------

with_cuda = pytest.mark.skipif(not fusedrnn._C.cuda, reason="a build without CUDA kernels")


def cuobjdump(*arguments):
    """What cuobjdump, of the wheel that `test` installs, prints of the extension."""
    folders = {Path(p) / "nvidia/cu13/bin" for p in sys.path}
    tools = [str(f) for f in folders if (f / "cuobjdump").exists()]
    path = os.pathsep.join([*tools, os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        pytest.skip("no cuobjdump (of the wheel nvidia-cuda-cuobjdump)")
    done = subprocess.run(
        [tool, *arguments, fusedrnn._C.__file__],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    return done.stdout


@with_cuda
def test_no_kernel_spills():
    """Nor keeps an array in memory: registers only, on every architecture."""
    text = cuobjdump("-res-usage")
    assert re.findall(r"arch = sm_(\w+)", text)
    kernels = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    names = {name for name, *_ in kernels}
    for kernel in ("forward_step", "backward_step", "forward_block", "backward_block"):
        assert any(kernel in name for name in names)
    assert [k for k in kernels if k[2] != "0" or k[3] != "0"] == []


def machine_code():
    """Of both paths' kernels, by name."""
    architecture = fusedrnn._C.cuda.split(", ")[0]
    text = cuobjdump("-sass", "-arch", f"sm_{architecture}")
    of_kernel = re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.DOTALL)
    return {k: code for k, code in of_kernel if re.search(r"(forward|backward)_(step|block)", k)}


@with_cuda
def test_the_reciprocal_is_an_instruction():
    """And no subroutine, which a division is; but in float64."""
    seen = 0
    for kernel, code in machine_code().items():
        if "ExactId" in kernel:
            continue
        assert not re.search(r"\*/\s+CALL", code), kernel  # unconditional
        if "forward" in kernel and "Lstm" in kernel:
            assert "MUFU.RCP" in code
            seen += 1
    assert seen


@with_cuda
def test_tensor_cores_are_used():
    seen = set()
    for kernel, code in machine_code().items():
        if "ExactI" in kernel:
            assert "HMMA" not in code
            seen.add("exact")
        elif "TensorCoreIf" in kernel:
            assert "HMMA.1688.F32.TF32" in code
            seen.add("tf32")
        elif "bfloat16" in kernel:
            assert "HMMA.16816.F32.BF16" in code
            seen.add("bfloat16")
        else:
            assert "HMMA.16816.F32 " in code
            seen.add("float16")
    assert seen == {"exact", "tf32", "bfloat16", "float16"}


@with_cuda
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU's driver")
def test_no_driver_is_told():
    nothing = ("cell", "offsets", "device_offsets", "reset", "device", "stream")
    shape = dict.fromkeys(nothing, 0) | dict.fromkeys(("number", "T", "B", "H", "P", "D"), 1)
    layer = fusedrnn._C.CudaLayer(**shape, reset_to_initial=False)
    with pytest.raises(RuntimeError, match=r"update the driver|no CUDA-capable device"):
        layer.block_ctas(False)


def configured(tmp_path, path=None, **environment):
    """CMake's run over csrc/ with this environment added; returns the finished process."""
    pybind11 = pytest.importorskip("pybind11")
    command = ["cmake", "-G", "Ninja", "-S", ROOT / "csrc", "-B", tmp_path / "build"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    environment = {**os.environ, "PATH": with_build_tools(path), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@needs_nvcc
@pytest.mark.parametrize(
    ("named", "built", "codes"),
    [
        (
            "90a 86 120,80, 100 ",
            "80, 86, 90a, 100, 120",
            "80 sm_80, 80 sm_86, 90a sm_90a, 100 sm_100, 100 sm_120, 100 compute_100",
        ),
        ("90a 89", "89, 90a", "89 sm_89, 90a sm_90a, 89 compute_89"),  # PTX of 90a is for it alone
        ("90a", "90a", "90a sm_90a"),
    ],
)
def test_architectures_can_be_named(tmp_path, named, built, codes):
    done = configured(tmp_path, FUSEDRNN_CUDA="1", FUSEDRNN_CUDA_ARCHS=named)
    assert done.returncode == 0, done.stderr
    assert f"fusedrnn: CUDA kernels for sm_{built}\n" in done.stdout
    commands = (tmp_path / "build" / "compile_commands.json").read_text()
    found = re.findall(r"arch=compute_(\w+),code=\[(\w+)\]", commands)
    assert ", ".join(map(" ".join, dict.fromkeys(found))) == codes


@needs_nvcc
@pytest.mark.parametrize(
    ("present", "built"), [("7.5 8.9", "89"), ("9.0 9.0", "90a"), ("8.0 99.0", None)]
)
def test_built_for_the_cards_that_are_here(tmp_path, present, built):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '%s\\n' {present}\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = configured(tmp_path, path, FUSEDRNN_CUDA="1", FUSEDRNN_CUDA_ARCHS="")
    assert done.returncode == 0, done.stderr
    if built is None:  # a GPU newer than nvcc: its driver compiles the PTX
        assert "does not know sm_990, which is here" in done.stdout
        assert "fusedrnn: CUDA kernels for sm_80, 86, 89, 90a" in done.stdout
        return
    assert f"fusedrnn: CUDA kernels for sm_{built}\n" in done.stdout


def test_cuda_can_be_left_out(tmp_path):
    done = configured(tmp_path, FUSEDRNN_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "fusedrnn: no CUDA kernels, for the CPU only\n" in done.stdout


def test_cuda_can_be_demanded(tmp_path):
    """Where there is no nvcc: with a PATH of nothing but the build's tools."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "cmake", "ninja", "as", "ld"):
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    without = {"CUDACXX": "", "CUDA_PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    done = configured(tmp_path, str(tools), FUSEDRNN_CUDA="1", **without)
    if "CUDA kernels for" in done.stdout:
        pytest.skip("CMake finds an nvcc that is not on PATH")
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert "FUSEDRNN_CUDA=1 asks for CUDA kernels, and no nvcc was found." in text
    assert "point CUDACXX at it" in text
