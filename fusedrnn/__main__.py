"""`python -m fusedrnn`: what is installed, whether it works, and how fast. With `run`, a program.

torch and the kernels are imported where they are used: that they cannot be is a thing to report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import fusedrnn

# What the kernels of an ISA need of the CPU, as Linux names it; best first.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_NEEDS = {
    "avx512_bf16": {*_AVX512, "avx512_bf16"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma"},
    "neon_bf16": {"asimd", "bf16"},
    "generic": set(),
}
_FEATURES = r"avx2|fma|f16c|avx512(f|bw|dq|vl|_vnni|_bf16|_fp16)|amx_\w+|asimd|sve2?|bf16"

Report = dict[str, Any]


def report() -> Report:
    """Everything that `python -m fusedrnn` prints; "problems" names what is missing or wrong."""
    found: Report = {
        "fusedrnn": fusedrnn.__version__,
        "folder": str(Path(__file__).parent),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "problems": [],
    }
    try:
        import torch

        # Where fusedrnn/__init__.py let an error pass, this is the same error again.
        ops = importlib.import_module("fusedrnn.ops")
    except Exception as error:
        found["problems"].append(f"{type(error).__name__}: {error}")
        return found
    asked = os.environ.get("FUSEDRNN_ISA") or None
    runtimes = _openmp_runtimes()
    found["torch"] = {"version": torch.__version__, "threads": torch.get_num_threads()}
    found["build"] = {
        "compiler": ops._C.compiler,
        "isas": ops._C.isas.split(", "),
        "cuda": ops._C.cuda.split(", ") if ops._C.cuda else [],
    }
    found["kernels"] = {"isa": ops.isa(), "FUSEDRNN_ISA": asked}
    found["openmp"] = {
        "libraries": runtimes,
        "shared_with_torch": None if runtimes is None else len(runtimes) == 1,
    }
    found["cuda"] = _cuda_devices()
    found["self_test"] = _self_test()
    found["speed"] = _speed()

    best = found["cpu"]["isa"]
    order = list(_NEEDS)
    if not asked and order.index(ops.isa()) > order.index(best):
        found["problems"].append(
            f"this CPU has {best}, but the {ops.isa()} kernels run: the build holds "
            f"{ops._C.isas}. Build it on this machine: `pip install .` in fusedrnn's source folder."
        )
    found["problems"] += _cuda_problems(found["cuda"], found["build"]["cuda"])
    for row in found["self_test"]:
        if row["error"]:
            found["problems"].append(
                f"self-test, {row['cell']} {row['dtype']} on {row['device']}: {row['error']}"
            )
    return found


def _cpu() -> Report:
    """Name, features that matter to recurrent layers, and the best ISA that they allow."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(model name|flags|Features)\s*: (.*)$", text, re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name", platform.machine()),
        "features": sorted(flag for flag in flags if re.fullmatch(_FEATURES, flag)),
        "isa": next(isa for isa, needs in _NEEDS.items() if needs <= flags),
    }


def _openmp_runtimes() -> list[str] | None:
    """The OpenMP libraries in this process: one, or they fight over the cores. None: unknown."""
    try:
        text = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return sorted(set(re.findall(r"(/.*/lib(?:gomp|i?omp5?)\b[^/\n]*)$", text, re.MULTILINE)))


def _cuda_devices() -> list[Report]:
    import torch

    from fusedrnn import cuda

    devices = []
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    for i in range(torch.cuda.device_count() if nvidia else 0):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append(
            {
                "name": torch.cuda.get_device_name(i),
                "architecture": f"{major}{minor}",
                "unavailable": cuda.unavailable(torch.device("cuda", i)),
            }
        )
    return devices


def _cuda_problems(devices: list[Report], built: list[str]) -> list[str]:
    """What keeps the CUDA kernels from the GPUs that are here."""
    rebuild = "rebuild where nvcc is: `pip install .` in fusedrnn's source folder"
    problems = []
    for device in devices:
        architecture = int(device["architecture"])
        if architecture < 80:  # then torch.nn computes, as it did
            continue
        if not built:
            problems.append(f"{device['name']}: this build has no CUDA kernels; {rebuild}")
        elif device["unavailable"]:
            problems.append(f"{device['name']}: {device['unavailable']}")
        elif not _runs_on(built, architecture):
            problems.append(
                f"{device['name']}: CUDA kernels for {', '.join(built)} only, this GPU has "
                f"{architecture}; {rebuild}"
            )
    return problems


def _runs_on(built: list[str], architecture: int) -> bool:
    """Code runs on later GPUs of its generation too, that of "90a" on no other, PTX on all later.

    PTX is of the first of 80 to 89, or from 100 on, of which is the last without a letter.
    """
    if f"{architecture}a" in built:
        return True
    numbers = [int(b) for b in built if b.isdigit()]
    with_ptx = [n for n in numbers if len(str(n)) == len(str(numbers[-1]))]
    same = [n for n in numbers if n // 10 == architecture // 10]
    return any(n <= architecture for n in with_ptx + same)


def _self_test() -> list[Report]:
    """Each cell in each dtype, both directions, forward and backward, against the reference."""
    import torch

    from fusedrnn import cuda, ops

    rows = []
    devices = ["cpu"]
    if torch.cuda.is_available() and cuda.available(torch.device("cuda")):
        devices.append("cuda")
    for device in devices:
        for cell in ops.CELLS:
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                try:
                    error = _kernels_differ(cell, dtype, device)
                except Exception as raised:
                    error = f"{type(raised).__name__}: {raised}"
                row = {"device": device, "cell": cell, "dtype": str(dtype)[6:], "error": error}
                rows.append(row)
    return rows


def _kernels_differ(cell: str, dtype: Any, device: str) -> str | None:
    """What is wrong with the kernels of a cell, dtype and device; None if nothing."""
    import torch

    from fusedrnn import functional, ops

    steps, batch, features, hidden = 12, 8, 24, 64
    states, rows = ops.CELLS[cell].states, ops.CELLS[cell].gates * hidden
    state = (2, batch, hidden)
    weights: list[tuple[int, ...]] = [(rows, features), (rows, hidden), (rows,), (rows,)]
    shapes = [(steps, batch, features), *[state] * states, *weights, *weights]
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        # Of `dtype`, so that the reference gets the same numbers in float64.
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return uniform.sub(0.5).div(2).to(device, dtype)

    def results(compute: Any, dtype: Any) -> list[torch.Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in given]
        outputs = compute(cell, inputs[0], tuple(inputs[1 : 1 + states]), inputs[1 + states :])
        return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(dtype) for g in grads])]

    given = [random(shape) for shape in shapes]
    grads = [random(shape) for shape in [(steps, batch, 2 * hidden), *[state] * states]]
    before = dict(ops.counts)
    computed = results(functional.layer, dtype)
    for name in ("kernel_forward", "kernel_backward"):
        if ops.counts[name] == before[name]:
            return f"{name} did not run"
    expected = results(functional.reference_layer, torch.float64)
    # One rounding of a narrow result, many of a wide one; gradients are long sums.
    bound = {torch.float32: 2e-5, torch.float64: 1e-11}.get(dtype, torch.finfo(dtype).eps)
    if device == "cuda":  # gates and their gradients are kept in `dtype`; float32 may be TF32
        bound = {torch.float32: 8 * 2.0**-11, torch.float64: 1e-11}.get(dtype, 16 * bound)
        if cell == "rnn_relu" and dtype is not torch.float64:
            # Where relu's argument is about zero rounding decides, and a gradient is any number.
            computed, expected = computed[: 1 + states], expected[: 1 + states]
    elif dtype is torch.bfloat16 and cell == "rnn_relu" and ops.BF16_PRODUCTS:
        bound *= 16  # where h is rounded a relu may turn, and a gradient with it
    for a, b in zip(computed, expected, strict=True):
        difference = ((a.double() - b).abs().max() / b.abs().max()).item()
        if not difference <= bound:  # NaN is too much as well
            return f"differs from the reference by {difference:.1e}"
    return None


def _speed() -> list[Report]:
    """Seconds of one call, medians of interleaved ones, of torch.nn's modules and of ours."""
    import torch

    rows = []
    input = torch.randn(100, 1, 128)
    for name in ("LSTM", "GRU", "RNN"):
        theirs, ours = getattr(torch.nn, name)(128, 128), getattr(fusedrnn, name)(128, 128)
        times: dict[Any, list[float]] = {theirs: [], ours: []}
        with torch.no_grad():
            for _ in range(60):
                for module, taken in times.items():
                    start = time.perf_counter()
                    module(input)
                    taken.append(time.perf_counter() - start)
        seconds = [statistics.median(taken[10:]) for taken in times.values()]
        rows.append({"module": name, "torch": seconds[0], "fusedrnn": seconds[1]})
    return rows


def _print(found: Report) -> None:
    def line(name: str, text: str) -> None:
        print(f"{name:<11}{text}")

    def listed(items: list[str]) -> str:
        return ", ".join(items) or "none"

    cpu = found["cpu"]
    line("fusedrnn", f"{found['fusedrnn']} in {found['folder']}")
    line("Python", found["python"])
    line("CPU", f"{cpu['name']}: {listed(cpu['features'])}")
    if "torch" in found:
        build, kernels, openmp = found["build"], found["kernels"], found["openmp"]
        line("torch", f"{found['torch']['version']}, {found['torch']['threads']} threads")
        line("built", f"by {build['compiler']}, for {listed(build['isas'])}")
        line(
            "kernels",
            f"{kernels['isa']}"
            + (", as FUSEDRNN_ISA says" if kernels["FUSEDRNN_ISA"] else "")
            + f" (the CPU's best: {cpu['isa']})",
        )
        if openmp["libraries"] is not None:
            shared = "shared with torch" if openmp["shared_with_torch"] else "NOT one for all"
            line("OpenMP", f"{listed(openmp['libraries'])}, {shared}")
        devices = [f"{d['name']} (architecture {d['architecture']})" for d in found["cuda"]]
        line("CUDA", f"architectures built: {listed(build['cuda'])}; present: {listed(devices)}")
        rows = found["self_test"]
        passed = sum(row["error"] is None for row in rows)
        line("self-test", f"{passed} of {len(rows)} passed: cells and dtypes, forward and backward")
        line("speed", "one sequence, T=100, H=128, float32, no_grad:")
        for row in found["speed"]:
            line(
                "",
                f"{row['module']:<5} torch.nn {row['torch'] * 1e3:6.3f} ms, "
                f"fusedrnn {row['fusedrnn'] * 1e3:6.3f} ms: "
                f"{row['torch'] / row['fusedrnn']:.2f} times as fast",
            )
    for problem in found["problems"]:
        line("PROBLEM", problem)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn",
        usage="python -m fusedrnn [--json]\n"
        "       python -m fusedrnn run SCRIPT [ARGS]\n"
        "       python -m fusedrnn run -m MODULE [ARGS]",
        description="Says which fusedrnn this is, how it was built, what it runs on, whether its "
        "kernels compute what they should, and how fast. Exits with 1 if something is missing. "
        "With `run`: runs a program, unchanged, with torch.nn's LSTM, GRU, RNN and cells built as "
        "fusedrnn's, in this process alone (see fusedrnn.patched).",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: list[str]) -> None:
    """`python SCRIPT ARGS` or `python -m MODULE ARGS` inside `fusedrnn.patched()`.

    sys.argv, sys.path and __name__ are what Python makes them, but torch is imported already. What
    the program raises, SystemExit included, is raised. SystemExit also if there is no program.
    """
    of_module = arguments[:1] == ["-m"]
    program, *rest = arguments[of_module:] or [""]
    if program in ("-h", "--help"):
        _parser().parse_args(["--help"])
    if not program or program.startswith("-"):
        _parser().error("run wants SCRIPT or -m MODULE")
    if not of_module and not os.path.exists(program):
        _parser().error(f"run: there is no file {program!r}")
    if of_module and importlib.util.find_spec(program.partition(".")[0]) is None:
        _parser().error(f"run: there is no module {program!r}")
    try:
        from fusedrnn.patching import patched
    except Exception as error:  # as in report()
        sys.exit(f"python -m fusedrnn run: {error}")

    sys.argv[:] = [program, *rest]
    with patched():
        if of_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            if not getattr(sys.flags, "safe_path", False):
                sys.path[0] = os.path.dirname(os.path.realpath(program))
            runpy.run_path(os.path.abspath(program), run_name="__main__")  # as __file__ is


def main(arguments: list[str]) -> int:
    """The exit code: 0, or 1 if something expected is missing or wrong."""
    if arguments[:1] == ["run"]:
        run(arguments[1:])
        return 0
    as_json = _parser().parse_args(arguments).json
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
