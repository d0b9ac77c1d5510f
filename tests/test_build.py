"""The build and what it leaves: metadata, setup.py's messages, and the libraries that the extension
pulls into a process. Not the kernels."""

import os
import re
import subprocess
import sys
from email.parser import HeaderParser
from importlib.metadata import version
from pathlib import Path

import pytest

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


def test_one_openmp_runtime_is_loaded():
    loaded = libraries_after("import fusedrnn")
    runtimes = [path for path in loaded if re.match(r"lib(gomp|i?omp5?)\b", Path(path).name)]
    assert len(runtimes) == 1
    assert Path(runtimes[0]).name.startswith("libgomp")


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
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
