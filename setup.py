"""Builds fusedrnn._C: finds a C++ compiler that is new enough, then runs CMake and Ninja.

Not here: flags and sources (csrc/CMakeLists.txt); name, version, dependencies (pyproject.toml).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST = {"gcc": 12, "clang": 14}


def compiler_version(command: list[str]) -> tuple[str, int]:
    """The kind and major version of a C++ compiler, read from its own macros."""
    arguments = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(arguments, capture_output=True, text=True).stdout
    major = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros))
    if "__clang_major__" in major:  # clang defines __GNUC__ too, as 4
        return "clang", int(major["__clang_major__"])
    return "gcc", int(major.get("__GNUC__", 0))


def find_compiler() -> str:
    """$CXX, else the first of c++, g++ and clang++ that is new enough; else exits, saying why."""
    seen = []
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if not shutil.which(command[0]):
            seen.append(f"{name}: not found")
            continue
        kind, major = compiler_version(command)
        if major >= OLDEST[kind]:
            return name
        seen.append(f"{name}: {kind} {major}" if major else f"{name}: not a C++ compiler")
    sys.exit(
        "\nfusedrnn needs a C++ compiler, gcc 12 or newer or clang 14 or newer, to build its "
        f"kernels.\nLooked for: {'; '.join(seen)}.\nInstall one (Debian, Ubuntu: apt-get install "
        "g++; Fedora: dnf install gcc-c++)\nor point CXX at it (CXX=clang++-14 pip install .)."
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        # Without build isolation, cmake and ninja may lie beside a Python that is not on PATH.
        path = os.environ.get("PATH", "") + os.pathsep + os.path.dirname(sys.executable)
        env = {**os.environ, "CXX": find_compiler(), "PATH": path}
        include = sysconfig.get_path("include")
        if not os.path.exists(os.path.join(include, "Python.h")):
            sys.exit(
                f"\nfusedrnn needs Python's C headers, and {include}/Python.h is missing.\n"
                "Install them (Debian, Ubuntu: apt-get install python3-dev)."
            )
        import pybind11  # after the checks: their messages need nothing but Python

        # One folder for every build of this Python: pip's temporary ones would lose the objects.
        build = Path("build", str(sys.implementation.cache_tag)).resolve()
        # Configured anew, as another compiler or environment may have come; unlike with --fresh the
        # objects stay, and ninja makes those again whose commands or sources changed.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for known in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(known)
        configure = ["cmake", "-G", "Ninja", "-S", "csrc", "-B", str(build)]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        for command in (configure, ["cmake", "--build", str(build)]):
            if subprocess.run(command, env=env).returncode:
                sys.exit("\nfusedrnn: the build of csrc/ failed; the reason is in the lines above.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that runs the old one must keep it whole
        shutil.copy2(build / target.name, target)


# Every file of csrc/ is named as a source, so that an sdist holds it.
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*") if path.is_file())
setup(ext_modules=[Extension("fusedrnn._C", SOURCES)], cmdclass={"build_ext": CMakeBuild})
