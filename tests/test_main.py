"""`python -m fusedrnn`, as a user types it: the report and its exit code, and `run`."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fusedrnn
import fusedrnn.__main__ as main
from fusedrnn import cuda, ops

ROOT = Path(__file__).parents[1]
DTYPES = {"float32", "float64", "bfloat16", "float16"}
DEVICES = 1 + (torch.cuda.is_available() and cuda.available(torch.device("cuda")))
ALL_PASSED = f"{DEVICES * 16} of {DEVICES * 16} passed"


def command(*arguments, cwd=ROOT, path=ROOT, **environment):
    """The finished process of `python -m fusedrnn ARGUMENTS`."""
    return subprocess.run(
        [sys.executable, "-m", "fusedrnn", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def found():
    done = command("--json", FUSEDRNN_ISA="")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)  # so nothing else stands there


@pytest.fixture
def program(tmp_path):
    """Writes a script in a folder of its own, beside a module `beside`; returns its path."""

    def write(text):
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        (folder / "beside.py").write_text("from torch.nn import LSTM\nmake = LSTM\n")
        path = folder / "script.py"
        path.write_text(text)
        return path

    return write


def test_report_says_versions_build_and_cpu(found):
    assert found["fusedrnn"] == fusedrnn.__version__
    assert found["folder"] == str(Path(fusedrnn.__file__).parent)
    assert found["torch"]["version"] == torch.__version__
    assert re.fullmatch(r"(gcc|Clang) \d+\..*", found["build"]["compiler"])
    assert found["build"]["isas"][-1] == "generic"
    assert found["build"]["cuda"] == (fusedrnn._C.cuda.split(", ") if fusedrnn._C.cuda else [])
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert found["kernels"]["isa"] == found["cpu"]["isa"]
    assert found["problems"] == []


def test_cpu_is_read_as_torch_reads_it(found):
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        pytest.skip("not an x86-64 CPU with AVX2")
    assert found["cpu"]["isa"].startswith(capability.lower().removesuffix("_vnni"))
    assert "fma" in found["cpu"]["features"]


def test_openmp_runtime_is_found(found):
    (library,) = found["openmp"]["libraries"]
    assert Path(library).name.startswith("libgomp")
    assert found["openmp"]["shared_with_torch"] is True


def test_self_test_has_every_cell_and_dtype(found):
    rows = {(row["cell"], row["dtype"]): row["error"] for row in found["self_test"]}
    assert rows == {(cell, dtype): None for cell in ops.CELLS for dtype in DTYPES}


def test_speed_has_three_rows(found):
    assert [row["module"] for row in found["speed"]] == ["LSTM", "GRU", "RNN"]
    for row in found["speed"]:
        assert 1e-6 < row["fusedrnn"] < 1
        assert 1e-6 < row["torch"] < 1


def test_text_has_what_the_json_has(found, capsys):
    main._print({**found, "problems": ["one", "two"]})
    text = capsys.readouterr().out
    for part in (
        found["torch"]["version"],
        found["build"]["compiler"],
        f"for {', '.join(found['build']['isas'])}",
        f"kernels    {found['kernels']['isa']} (the CPU's best: {found['cpu']['isa']})",
        f"architectures built: {', '.join(found['build']['cuda']) or 'none'}",
        ALL_PASSED,
        "PROBLEM    one\nPROBLEM    two\n",
    ):
        assert part in text
    assert len(re.findall(r"(?:LSTM|GRU|RNN) +torch.nn .* times as fast", text)) == 3


def test_kernels_that_were_asked_for_are_no_problem():
    done = command(FUSEDRNN_ISA="generic")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generic, as FUSEDRNN_ISA says" in done.stdout
    assert ALL_PASSED in done.stdout


def test_kernels_below_the_cpus_best_are_a_problem(monkeypatch):
    monkeypatch.delenv("FUSEDRNN_ISA", raising=False)
    cpu = {"name": "a CPU", "features": [], "isa": "avx512"}
    monkeypatch.setattr(main, "_cpu", lambda: cpu)
    monkeypatch.setattr(ops, "isa", lambda: "avx2")
    (problem,) = main.report()["problems"]
    assert problem.startswith("this CPU has avx512, but the avx2 kernels run")
    cpu["isa"] = "generic"  # better than expected is none
    assert main.report()["problems"] == []


def test_kernels_that_compute_something_else_fail_the_self_test(monkeypatch, capsys):
    right = ops.backward

    def wrong(cell, *arguments):
        first, *others = right(cell, *arguments)
        return first, *(g * 1.1 if cell == "gru" else g for g in others)

    monkeypatch.setattr(ops, "backward", wrong)
    assert main.main([]) == 1
    text = capsys.readouterr().out
    assert f"{DEVICES * 12} of {DEVICES * 16} passed" in text
    problems = re.findall(
        r"PROBLEM +self-test, gru (\w+) on cpu: differs from the reference by 1", text
    )
    assert set(problems) == DTYPES


def test_kernels_that_give_nan_or_raise_fail_the_self_test(monkeypatch):
    right = ops.forward

    def wrong(cell, *arguments):
        results, saved = right(cell, *arguments)
        if cell == "lstm":
            raise RuntimeError("no memory")
        return (results[0], results[1] + float("nan")), saved

    monkeypatch.setattr(ops, "forward", wrong)
    errors = [row["error"] for row in main._self_test()]
    expected = ["RuntimeError: no memory"] * 4 + ["differs from the reference by nan"] * 12
    assert errors == expected * DEVICES


def test_kernels_that_do_not_run_fail_the_self_test(monkeypatch):
    monkeypatch.setattr(ops, "forward", lambda *_: None)
    assert {row["error"] for row in main._self_test()} == {"kernel_forward did not run"}


def test_a_missing_extension_is_reported(tmp_path, program):
    shutil.copytree(
        Path(fusedrnn.__file__).parent,
        tmp_path / "fusedrnn",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    # No file at all would be looked for elsewhere, and found where an editable install has it.
    (tmp_path / "fusedrnn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    done = command("--json", cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert "fusedrnn._C cannot be loaded" in problem
    assert "pip install ." in problem
    assert "is fusedrnn's source" not in problem
    (tmp_path / "csrc").mkdir()
    (problem,) = json.loads(command("--json", cwd=tmp_path, path=tmp_path).stdout)["problems"]
    assert f"{tmp_path} is fusedrnn's source, which Python finds before" in problem
    assert "pip install -e ." in problem
    done = command(cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    assert "PROBLEM    RuntimeError: fusedrnn's compiled extension" in done.stdout
    assert done.stderr == ""
    done = command("run", program("print('ran')"), cwd=tmp_path, path=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("python -m fusedrnn run: fusedrnn's compiled extension")


def test_a_wrong_isa_is_reported():
    done = command(FUSEDRNN_ISA="sse9")
    assert done.returncode == 1
    assert "PROBLEM    RuntimeError: FUSEDRNN_ISA=sse9 is not known" in done.stdout


def test_the_error_passes_to_whoever_else_imports(tmp_path):
    # `-m` of another package, which imports fusedrnn while Python looks for it.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import fusedrnn\n")
    (tmp_path / "other" / "__main__.py").write_text("print('ran')\n")
    done = subprocess.run(
        [sys.executable, "-m", "other"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FUSEDRNN_ISA": "sse9"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "RuntimeError: FUSEDRNN_ISA=sse9" in done.stderr


SHOW = """
import json, sys
import torch, beside
ran = beside.make(3, 4)
from fusedrnn import ops
output, (h_n, c_n) = ran(torch.randn(5, 2, 3))
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "is": isinstance(ran, torch.nn.LSTM), "kernels": ops.counts["kernel_forward"],
}))
"""


def test_run_is_the_script_with_the_classes_replaced(program, tmp_path):
    script = program(SHOW)
    link = tmp_path / "link.py"
    link.symlink_to(script)
    for path in (script, Path("programs/script.py"), link):
        done = command("run", path, "--json", "-m", "x", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {
            "argv": [str(tmp_path / path), "--json", "-m", "x"],
            "path": str(script.parent),
            "name": "__main__",
            "file": str(tmp_path / path),
            "main": True,
            "is": True,
            "kernels": 1,
        }


def test_run_is_the_module_with_the_classes_replaced(program):
    script = program(SHOW)
    done = command("run", "-m", "script", "--help", cwd=script.parent)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["argv"] == [str(script), "--help"]
    assert shown["kernels"] == 1
    assert shown["name"] == "__main__"
    assert shown["main"]


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('no data')", 1, "no data\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_exit_codes_and_exceptions_are_the_programs(program, text, code, error):
    done = command("run", program(text))
    assert done.returncode == code
    assert done.stderr.endswith(error)


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_torch_is_left_as_it_was(program, end):
    script = program(f"import torch\nassert type(torch.nn.GRU(1, 1)) is not torch.nn.GRU\n{end}")
    code = (
        "import sys, torch, fusedrnn.__main__ as main\n"
        "before = list(vars(torch.nn.GRU).items())\n"
        "try: main.main(['run', sys.argv[1]])\n"
        "except BaseException as error: print(type(error).__name__)\n"
        "assert list(vars(torch.nn.GRU).items()) == before\n"
        "assert type(torch.nn.GRU(1, 1)) is torch.nn.GRU\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == {"": "", "1": "ZeroDivisionError", "r": "SystemExit"}[end[:1]]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run"], "run wants SCRIPT or -m MODULE"),
        (["run", "-m"], "run wants SCRIPT or -m MODULE"),
        (["run", "--jsn", "x.py"], "run wants SCRIPT or -m MODULE"),
        (["run", "missing.py"], "run: there is no file 'missing.py'"),
        (["run", "-m", "missing.one"], "run: there is no module 'missing.one'"),
        (["--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_a_wrong_command_is_said_in_one_line(capsys, arguments, error):
    with pytest.raises(SystemExit) as raised:
        main.main(arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert error in printed.err.splitlines()[-1]
    assert printed.out == ""


def test_a_wrong_command_prints_no_traceback():
    done = command("run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_names_both_commands(capsys, arguments):
    with pytest.raises(SystemExit) as raised:
        main.main(arguments)
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m fusedrnn [--json]" in printed
    assert "python -m fusedrnn run -m MODULE [ARGS]" in printed


@pytest.mark.parametrize(
    ("architecture", "built", "problem"),
    [
        ("75", [], None),  # torch.nn's
        ("90", [], "no CUDA kernels"),
        ("90", ["80", "90a", "120"], None),
        ("87", ["80", "90a", "120"], None),  # later than 80, of its generation
        ("110", ["90a", "100", "120"], None),  # by PTX, which is for 100
        ("90", ["80", "86"], None),  # PTX of the last
        ("90", ["80", "120"], "for 80, 120 only, this GPU has 90"),
        ("121", ["90a"], "for 90a only"),  # it is for that GPU alone
        ("121", ["80", "90a"], None),  # PTX of 80
    ],
)
def test_gpus_that_the_build_is_not_for_are_named(architecture, built, problem):
    devices = [{"name": "A GPU", "architecture": architecture, "unavailable": None}]
    found = main._cuda_problems(devices, built)
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


def test_a_driver_that_is_too_old_is_named():
    devices = [{"name": "A GPU", "architecture": "90", "unavailable": "the driver is old"}]
    assert main._cuda_problems(devices, ["90a"]) == ["A GPU: the driver is old"]
