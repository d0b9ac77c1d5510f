"""The benchmark suite, `python -m benchmarks`, at sizes that take a second: what it finds, keeps
and says. How fast anything is is not tested.
"""

import copy
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ran

import fusedrnn
from benchmarks import common, memory, peers, report, suite
from benchmarks.__main__ import main
from benchmarks.workloads import gradient_flow

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--shapes", "1x6x8,2x1x4", "--cells", "LSTM", "--rounds", "3", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def short_rounds():
    """Times of a millisecond mean nothing, and are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "ROUND_NS", 1_000_000)
        patch.setattr(suite, "NOISE_ROUNDS", 3)
        patch.setattr(suite.limits, "GEMM_SIZE", 64)
        patch.setattr(suite.limits, "MEMORY_BYTES", 1 << 20)
        patch.setattr(suite.limits, "REPEATS", 2)
        yield


def run(path, *options, backends="loop"):
    """The exit code of a run, and its JSON."""
    code = main(["run", *SMALL, "--backends", backends, "--out", str(path), *options])
    return code, json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(file, content) of a whole small run."""
    path = tmp_path_factory.mktemp("suite") / "a.json"
    code, content = run(path)
    assert code == 0
    return path, content


def refused(capsys, *arguments):
    """What is said of a bad command line: one line, with exit code 2, and nothing else."""
    with pytest.raises(SystemExit) as raised:
        main(list(arguments))
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# A run --------------------------------------------------------------------------------------------


def test_run_measures_every_row(finished):
    _, content = finished
    assert content["complete"] is True
    rows = {(row["cell"], row["mode"]): row for row in content["rows"]}
    assert list(rows) == [
        (cell, mode) for cell in ("LSTM", "LSTMCell") for mode in ("inference", "training")
    ]
    for (cell, mode), row in rows.items():
        assert (row["batch"], row["steps"], row["size"]) == ((2, 1, 4), (1, 6, 8))[cell == "LSTM"]
        assert row["ran"] == "kernels"
        assert set(row["peers"]) == {"torch.nn", "loop"}
        for peer in row["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["ms"] / peer["fusedrnn_ms"])
            assert peer["quartiles"][0] <= peer["quartiles"][1]
            assert peer["rounds"] == 3
        assert ("memory" in row) == (mode == "training")
        assert ("of_l2" in row) == (cell == "LSTM")
        limit = content["limits"]["1"]["gemm"]["float32"]
        assert row["of_gemm"] == pytest.approx(row["gflops"] / limit)


def test_run_describes_the_machine(finished):
    machine = finished[1]["environment"]
    assert machine["isa"] == fusedrnn.isa()
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == [1]
    assert machine["cpu"] == common.cpu_model()
    assert finished[1]["noise"]["1"]["low"] <= finished[1]["noise"]["1"]["high"]


def test_what_limits_a_library_is_said(finished, monkeypatch):
    def said():
        lines = suite.start_lines(finished[1] | {"environment": suite.environment([1])})
        return [line for line in lines if "limited" in line]

    for name in suite.LIMITING:
        monkeypatch.delenv(name, raising=False)
    assert said() == []
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert said() == ["- limited by the environment: ONEDNN_MAX_CPU_ISA=AVX2"]


def test_operations_are_those_of_the_products():
    """Counted as torch counts them, over the loop of the reference."""
    from torch.utils.flop_counter import FlopCounterMode

    for cell, shape in (("LSTM", (3, 5, 8)), ("GRU", (2, 4, 6)), ("RNNCell", (4, 1, 8))):
        case = suite.make_cases(cell, "float32", shape)["torch.nn"]
        if cell != "RNNCell":  # a state, so that the first step is like the others
            states = [torch.zeros(1, shape[0], shape[2], requires_grad=True) for _ in range(2)]
            case.hx = tuple(states) if cell == "LSTM" else states[0]
        for mode, name in suite.MODES.items():
            row = suite.Row(cell, "float32", shape, 1, mode, 3)
            with FlopCounterMode(display=False) as counter:
                peers.loop(case, name, 1).values(name)
            assert counter.get_total_flops() == round(row.gflop * 1e9)


def test_suites_have_the_rows_that_reports_and_plots_need():
    quick = suite.rows(suite.SUITES["quick"], [1, 2])
    assert {row.cell.removesuffix("Cell") for row in quick} == set(common.CELLS)
    assert {row.dtype for row in quick} == {"float32"}
    whole = suite.rows(suite.SUITES["cpu"], [1, 2])
    assert len({(*row.key.values(),) for row in whole}) == len(whole)
    assert {row.dtype for row in whole} == set(suite.DTYPES)
    layers = {row.shape for row in whole if not row.is_cell}
    assert layers >= {*suite.SHAPES, *suite.MAP_SHAPES}
    assert {row.shape for row in quick if not row.is_cell} <= layers
    assert any(row.shape[1] <= peers.UNROLLED for row in whole if not row.is_cell)


def test_noise_is_said_aloud(finished):
    content = copy.deepcopy(finished[1])
    content["noise"]["1"]["noisy"] = False
    assert "BUSY" not in "\n".join(suite.start_lines(content))
    content["noise"]["1"]["noisy"] = True
    assert "BUSY" in "\n".join(suite.start_lines(content))


def test_noise_is_found(monkeypatch):
    timing = common.Timing({"torch.nn": [1.0, 1.0, 1.0], "fusedrnn": [1.0, 1.0, 1.01]})
    monkeypatch.setattr(common, "interleave", lambda calls, rounds: timing)
    monkeypatch.setattr(suite, "busy_seconds", lambda: 7.0)
    assert suite.measure_noise()["noisy"] is False
    timing.rounds["fusedrnn"] = [0.8, 1.0, 1.3]
    assert suite.measure_noise()["noisy"] is True
    timing.rounds["fusedrnn"] = [1.0, 1.0, 1.0]
    seconds = iter([7.0, 8.0])  # one more, in no time
    monkeypatch.setattr(suite, "busy_seconds", lambda: next(seconds))
    assert suite.measure_noise()["noisy"] is True
    monkeypatch.setattr(suite, "busy_seconds", lambda: float("nan"))
    noise = suite.measure_noise()
    assert noise["others"] is None
    assert noise["noisy"] is False


def test_threads_that_share_a_core_are_found(monkeypatch):
    with common.threads(2):
        monkeypatch.setattr(common, "fastest_probe", {})
        assert common.has_cores()  # nothing was faster
        assert common.fastest_probe.keys() == {2}
        common.fastest_probe[2] /= 1000
        assert not common.has_cores()
    with common.threads(1):
        assert common.has_cores()


def test_rounds_wait_for_cores_for_a_while(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(common, "sleep", waits.append)
    monkeypatch.setattr(common, "ROUND_NS", 1)
    calls = {"torch.nn": lambda: None, "fusedrnn": lambda: None}
    answers = iter([False, False, True, True, True])
    monkeypatch.setattr(common, "has_cores", lambda: next(answers))
    timing = common.interleave(calls, 3)
    assert (len(timing.rounds["torch.nn"]), timing.crowded) == (3, 0)
    assert waits.count(common.WAIT_SECONDS) == 2
    waits.clear()
    monkeypatch.setattr(common, "has_cores", lambda: False)
    timing = common.interleave(calls, 4)
    assert (len(timing.rounds["torch.nn"]), timing.crowded) == (4, 4)
    waited = common.WAIT_SECONDS * waits.count(common.WAIT_SECONDS)
    assert common.PATIENCE_SECONDS <= waited < common.PATIENCE_SECONDS + 2 * common.WAIT_SECONDS


def test_crowded_rounds_are_said_aloud(finished):
    content = copy.deepcopy(finished[1])
    for row in content["rows"]:
        for peer in row["peers"].values():
            if "ratio" in peer:
                peer["crowded"] = 0
    assert "shared a core" not in report.report(content)
    content["rows"][0]["peers"]["torch.nn"]["crowded"] = 2
    text = report.report(content)
    assert "- threads shared a core in 2 of " in text
    assert "(2 crowded)" in text


def test_own_work_is_not_that_of_others():
    """All CPUs have worked at least as long as this process."""
    busy, own = suite.busy_seconds(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert suite.busy_seconds() - busy >= 0.2 - 0.05 or busy != busy


# Checks -------------------------------------------------------------------------------------------


def small_row(mode="training", cell="LSTM"):
    row = suite.Row(cell, "float32", (2, 5, 8), 1, mode, 3)
    cases = suite.make_cases(row.cell, row.dtype, row.shape)
    expected = common.exact(cases["torch.nn"], suite.MODES["training"])
    limit = suite.Limits({"float32": 100.0}, 100.0, 10.0, 1 << 20)
    return row, cases, expected, limit


def test_wrong_results_are_not_timed(monkeypatch):
    row, cases, expected, limit = small_row()
    monkeypatch.setattr(common, "interleave", lambda *_: pytest.fail("timed"))
    with torch.no_grad():
        cases["fusedrnn"].module.weight_hh_l0[0, 0] += 0.01
    entry = suite.measure_row(row, cases, expected, limit, [], 1.0)
    assert entry["failed"].startswith("check: LSTM")
    assert entry["peers"] == {}


@pytest.mark.parametrize("ours", [4.6e-7, 7e-7])
def test_torchs_luck_with_one_draw_of_data_does_not_judge(monkeypatch, ours):
    row, cases, expected, _ = small_row()
    errors = {id(cases["fusedrnn"]): ours, id(cases["torch.nn"]): 1.5e-7}
    monkeypatch.setattr(common, "errors", lambda case, *_: [errors.get(id(case), 2.7e-7)])
    arguments = (cases, suite.MODES[row.mode], expected)
    with pytest.raises(RuntimeError, match=r"by 1\.5e-07$"):
        common.check_values(*arguments)
    draws = []

    def draw(seed):
        draws.append(suite.make_cases(row.cell, row.dtype, row.shape, seed))
        return draws[-1]

    if ours <= 2 * 2.7e-7 + torch.finfo(torch.float32).eps:
        common.check_values(*arguments, draw)
        assert len(draws) == 1
        assert not torch.equal(draws[0]["torch.nn"].input, cases["torch.nn"].input)
    else:
        with pytest.raises(RuntimeError, match=r"by 2\.7e-07$"):
            common.check_values(*arguments, draw)


@pytest.mark.parametrize("name", ["loop", "onnxruntime"])
def test_wrong_results_of_a_peer_are_not_timed(monkeypatch, name):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    row, cases, expected, limit = small_row("inference")
    build = peers.PEERS[name]

    def wrong(case, mode, threads):
        other = copy.deepcopy(case)
        with torch.no_grad():
            other.module.weight_hh_l0[0, 0] += 0.01
        return build(other, mode, threads)

    monkeypatch.setitem(peers.PEERS, name, wrong)
    entry = suite.measure_row(row, cases, expected, limit, [name], 1.0)
    assert re.match(r"check: tensor \d of results", entry["peers"][name]["failed"])
    assert "ms" not in entry["peers"][name]
    assert "ratio" in entry["peers"]["torch.nn"]
    content = {"rows": [entry], "workloads": []}
    assert len(suite.failures(content)) == 1


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_peers_compute_the_same(cell, mode):
    shape = (2, 1, 8) if cell.endswith("Cell") else (2, 5, 8)
    case = suite.make_cases(cell, "float32", shape)["torch.nn"]
    expected = common.exact(case, suite.MODES["training"])
    names = ["loop"]
    if "onnxruntime" not in peers.missing():
        names += ["onnxruntime"] * peers.applies("onnxruntime", cell, "float32", suite.MODES[mode])
    for name in names:
        peer = peers.PEERS[name](case, suite.MODES[mode], 1)
        values = peer.values(suite.MODES[mode])
        right = common.exact(case, suite.MODES[mode])
        assert len(values) == len(right)
        peers.check(peer, suite.MODES[mode], expected, torch.float32)


def test_torch_compile_is_timed_or_says_why_not(monkeypatch):
    """The compiler is left out, which takes seconds: what dynamo captures is run as it is."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend="eager"))
    cell = suite.make_cases("GRUCell", "float32", (2, 1, 8))["torch.nn"]
    peer = peers.compiled(cell, "no_grad", 1)
    peers.check(peer, "no_grad", common.exact(cell, "no_grad"), torch.float32)
    layer = suite.make_cases("GRU", "float32", (2, peers.UNROLLED + 1, 8))["torch.nn"]
    with pytest.raises(peers.Unavailable, match="leaves GRU to eager mode"):
        peers.compiled(layer, "no_grad", 1)

    def broken(graph, inputs):
        raise ValueError("no compiler\nfurther lines")

    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend=broken))
    with pytest.raises(peers.Unavailable, match=r"^fails: .*no compiler$"):
        peers.compiled(cell, "no_grad", 1)


def test_a_row_without_kernels_says_so(monkeypatch, finished, tmp_path, capsys):
    """On the run's way to the report."""
    monkeypatch.setattr(fusedrnn.modules, "_TORCH_MULTIPLIES_FASTER", True)
    monkeypatch.setattr(fusedrnn.modules, "_torch_is_faster", lambda *_: True)
    code, content = run(tmp_path / "a.json", "--shapes", "1x6x8", "--dtype", "bfloat16")
    assert code == 0
    assert [row["ran"] for row in content["rows"]] == ["torch", "torch"]
    assert "Rows that not the kernels alone computed: 2." in capsys.readouterr().out
    main(["report", str(finished[0])])
    assert "Rows that not the kernels alone computed: 0." in capsys.readouterr().out


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "recompute", "floats"), [
    ("LSTM", False, 5), ("LSTM", True, 2), ("GRU", False, 4), ("GRU", True, 1),
])  # fmt: skip
def test_saved_bytes_are_those_of_the_readme(cell, recompute, floats):
    batch, steps, size = 3, 7, 16
    case = suite.make_cases(cell, "float32", (batch, steps, size))["fusedrnn"]
    case.module.recompute_gates = recompute
    assert memory.saved_bytes(case) == 4 * floats * batch * steps * size


def test_saved_bytes_count_a_storage_once():
    """`exp` keeps its result, `square` its argument: the same storage."""
    case = suite.make_cases("RNN", "float32", (2, 3, 4))["torch.nn"]
    case.module, case.hx = torch.nn.Identity(), None
    case.input = torch.ones(10, 100)
    weight = torch.ones(10, 100, requires_grad=True)

    def forward():
        return [(weight + case.input).exp().square()]

    case.forward = forward
    assert memory.saved_bytes(case) == 4 * 10 * 100


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_peak_is_the_memory_in_use_at_once():
    size = 40 << 20  # above 32 MiB, malloc gives memory back at once

    def one_after_the_other():
        for _ in range(2):
            torch.ones(size // 4)

    def together():
        return torch.ones(size // 4), torch.ones(size // 4)

    def not_torch():
        ctypes.memset(ctypes.create_string_buffer(size), 1, size)

    for call, expected in ((one_after_the_other, 1), (together, 2), (not_torch, 1)):
        assert memory.peak_bytes(call) == pytest.approx(expected * size, rel=0.05)
    assert memory.peak_bytes(lambda: None) < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_peak_has_the_kernels_scratch_memory():
    layer = fusedrnn.LSTM(512, 512)
    weights = 2 * 4 * 512 * 512 * 4  # bytes, laid out anew

    def call():
        with torch.inference_mode(), ran("kernel_forward"):
            layer(torch.zeros(8, 1, 512))

    assert weights < memory.peak_bytes(call) < 1.5 * weights


def test_peak_is_none_where_the_system_does_not_tell(monkeypatch):
    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", forbidden)
    assert memory.peak_bytes(lambda: None) is None


# Interruptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt, 130), (suite.Terminated, 143)])
def test_an_interruption_keeps_what_was_found(monkeypatch, tmp_path, capsys, end, code):
    measure = suite.measure_row
    done = []

    def interrupted(row, *arguments):
        if len(done) == 2:
            raise end
        done.append(row)
        return measure(row, *arguments)

    monkeypatch.setattr(suite, "measure_row", interrupted)
    found, content = run(tmp_path / "a.json")
    assert found == code
    assert content["complete"] is False
    assert len(content["rows"]) == 2
    assert content["expected_rows"] == 4
    assert "interrupted: 2 of 4 rows are in" in capsys.readouterr().err
    main(["report", str(tmp_path / "a.json")])
    assert "**INCOMPLETE: 2 of 4 rows.**" in capsys.readouterr().out


def test_an_exception_in_a_row_leaves_the_others(monkeypatch, tmp_path, capsys):
    measure = suite.measure_row

    def failing(row, *arguments):
        if row.mode == "inference" and row.cell == "LSTM":
            raise MemoryError("no more\nof it")
        return measure(row, *arguments)

    monkeypatch.setattr(suite, "measure_row", failing)
    code, content = run(tmp_path / "a.json")
    assert code == 1
    assert content["complete"] is True
    assert ["failed" in row for row in content["rows"]] == [True, False, False, False]
    failure = "LSTM float32 1x6x8 inference, threads: 1: MemoryError: no more"
    assert suite.failures(content) == [failure]
    assert failure in capsys.readouterr().out
    for command in ("report", "plot"):
        assert main([command, str(tmp_path / "a.json")]) == 0


def test_a_signal_ends_a_run_with_its_file_whole(tmp_path):
    path = tmp_path / "a.json"
    arguments = ["--threads", "1", "--backends", "loop", "--out", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if path.exists() and json.loads(path.read_text())["rows"]:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert 0 < len(content["rows"]) < content["expected_rows"]
    assert f"of {content['expected_rows']} rows are in {path}" in errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["a.json"]


# The other commands -------------------------------------------------------------------------------


def set_ratios(content, ratios):
    """As if torch.nn had taken `ratios` times as long as fusedrnn, row by row."""
    for row, ratio in zip(content["rows"], ratios, strict=True):
        timed = row["peers"]["torch.nn"]
        timed |= {"ms": ratio, "fusedrnn_ms": 1.0, "ratio": ratio}


def test_report_has_readmes_table_and_every_loss(finished, tmp_path, capsys):
    content = copy.deepcopy(finished[1])
    set_ratios(content, [0.5, 2.0, 3.0, 0.8])
    for row in content["rows"]:
        row["peers"]["loop"]["ratio"] = 5.0
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert main(["report", str(path), "--out", str(tmp_path / "a.md")]) == 0
    assert (tmp_path / "a.md").read_text() == printed
    for line in (
        "| B, T, H | LSTM | GRU | RNN | LSTM | GRU | RNN |",
        "|---|--:|--:|--:|--:|--:|--:|",
        "| 1, 6, 8 | **0.50** | - | - | 2.00 | - | - |",
        "Rows in which fusedrnn is slower: 2.",
        "- LSTM float32 1x6x8 inference, threads: 1: 0.50 of torch.nn",
        "- LSTMCell float32 2x1x4 training, threads: 1: 0.80 of torch.nn",
        "| LSTM | float32 | inference | 1 | 0.50 **slower** (1 of 1 slower) "
        "| 0.50 **slower** at 1, 6, 8 | 5.00 (0 of 1 slower) |",
        "- cuDNN, in every row: no CUDA GPU was found" if not torch.cuda.is_available() else "",
    ):
        assert line in printed.splitlines()
    memory_row = next(line for line in printed.splitlines() if "| LSTM | float32 | 1, 6, 8" in line)
    saved = content["rows"][1]["memory"]["torch.nn"]["saved_bytes"] / 1024
    assert f"| {saved:.0f} |" in memory_row


@pytest.mark.parametrize(
    ("machine", "dtype"), [("zen4", "float32"), ("zen4", "bfloat16"), ("zen5", "float32")]
)
def test_numbers_are_the_readmes(machine, dtype):
    """README's tables are what the report prints of the results that are kept."""
    from benchmarks import report

    results = ROOT / f"benchmarks/results/{machine}-avx512-2cores-cpu.json"
    lines = report.numbers(json.loads(results.read_text()), dtype)
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 5
    assert "\n".join(table) in (ROOT / "README.md").read_text()


def test_what_readme_shows_is_there():
    text = (ROOT / "README.md").read_text()
    paths = re.findall(r"\]\(([\w-]+(?:[./][\w-]+)+)\)", text)
    paths += re.findall(r'<img src="([^"]+)"', text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_compare(finished, tmp_path, capsys):
    first, second = copy.deepcopy(finished[1]), copy.deepcopy(finished[1])
    set_ratios(first, [1.0, 2.0, 3.0, 4.0])
    set_ratios(second, [2.0, 2.0, 3.0, 4.0])
    second["rows"][1]["peers"]["torch.nn"]["fusedrnn_ms"] = 4.0
    second["rows"][3]["mode"] = "other"
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(content))
    assert main(["compare", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any("WARNING" in line for line in lines)
    row = "LSTM float32 1x6x8 inference, threads: 1"
    assert f"| {row} | 1.000 | 1.000 | 1.00 | 1.00 | 2.00 | 2.00 |" in lines
    row = "LSTM float32 1x6x8 training, threads: 1"
    assert f"| {row} | 1.000 | 4.000 | 0.25 **slower** | 2.00 | 2.00 | 1.00 |" in lines
    assert any("of 3 rows" in line and "time 0.630, ratio to torch.nn 1.260" in line
               for line in lines)  # fmt: skip
    only = lines.index("Only in A: 1.")
    assert lines[only + 1] == "- LSTMCell float32 2x1x4 training, threads: 1"
    assert "Only in B: 1." in lines

    second["environment"]["torch"] = "1.0"
    paths[1].write_text(json.dumps(second))
    assert main(["compare", *map(str, paths)]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "torch 2" in warnings[0]
    assert "1.0" in warnings[0]


def test_plot_draws_png_and_svg(finished, tmp_path, capsys):
    content = copy.deepcopy(finished[1])
    set_ratios(content, [0.5, 2.0, 3.0, 4.0])
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert main(["plot", str(tmp_path / "a.json"), "--out", str(tmp_path / "new" / "folder")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in paths) == [
        f"a-{kind}-float32-threads1.{suffix}"
        for kind in ("heatmap", "roofline")
        for suffix in ("png", "svg")
    ]
    for path in paths:
        start = b"\x89PNG" if path.suffix == ".png" else b"<?xml"
        assert path.read_bytes().startswith(start)


def test_workloads_leave_what_they_found(monkeypatch, tmp_path, capsys):
    """One workload at a small size, and one that fails."""

    def small(arguments):
        return gradient_flow.main([*arguments, "--steps", "3", "--length", "5", "--hidden", "4"])

    def failing(arguments):
        raise RuntimeError("no data")

    monkeypatch.setitem(suite.WORKLOADS, "gradient_flow", small)
    monkeypatch.setitem(suite.WORKLOADS, "classify", failing)
    path = tmp_path / "a.json"
    arguments = ["--names", "gradient_flow,classify", "--quick", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        code = main(["run", "--suite", "workloads", *arguments, "--out", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert code == 1
    content = json.loads(path.read_text())
    assert content["complete"] is True
    record, failed = content["workloads"]
    assert failed["failed"] == "RuntimeError: no data"
    assert set(record["trainings"][0]["step_ms"]) == {"torch.nn", "fusedrnn"}
    errors, accuracy = record["measures"]
    assert errors["reached"] == {"torch.nn": True, "fusedrnn": True}
    assert accuracy["threshold"] == "at least 0.95"
    assert record["seconds"] > 0
    assert (tmp_path / "a-workloads" / "gradient_flow.png").exists()
    for training in record["trainings"]:  # of three steps each: any is slower by chance
        assert training["speedup"] > 0
        training["speedup"] = 2.0
    record["trainings"][0]["speedup"] = 0.5
    alone = {"title": "torch's", "step_ms": {"torch.nn": 1.0}, "seconds": {"torch.nn": 2.0}}
    record["trainings"].append(alone | {"speedup": None})
    errors["values"]["fusedrnn"] = None
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["compare", str(path), str(path)]) == 0
    assert "torch's" not in capsys.readouterr().out
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| classify | **failed: RuntimeError: no data** |" in printed
    assert "Rows in which fusedrnn is slower: 1.\n- gradient_flow " in printed
    assert "| gradient_flow | largest error of an RNN's factor | fusedrnn |" in printed


def test_the_cuda_suite_has_bench_cudas_rows(monkeypatch, tmp_path, capsys):
    """What bench_cuda measures is made up: there need not be a GPU."""
    bench_cuda = suite.bench_cuda
    entry = {"cell": "GRU", "batch": 8, "size": 64, "number": "tf32", "steps": 512}
    entry |= {"mode": "no_grad", "chosen": "step", "rounds": 5, "failures": {}}
    entry["device_ms"] = {"torch.nn": 3.0, "step": 2.0, "block": 1.0}
    entry["wall_ms"] = {"torch.nn": 4.0, "step": 3.0, "block": 2.0}
    wrong = entry | {"mode": "forward+backward", "device_ms": {"torch.nn": 3.0, "block": 1.0}}
    wrong["failures"] = {"step": "tensor 0: 1.0e+00"}
    limits = [{"what": "grid.sync", "us": 1.5}, {"what": "cluster barrier", "us": 0.2}]
    packed = {"cell": "GRU", "number": "tf32", "shape": (32, 100, 128), "mode": "no_grad"}
    packed |= {"device_ms": {"torch.nn": 3.0, "step": 4.0, "block": 1.5}, "failures": {}}
    noise = common.Timing({"torch.nn": [0.9, 1.0, 1.1], "fusedrnn": [1.0, 1.0, 1.0]})

    def measure(report, quick):
        assert quick
        report.rows = [entry, wrong]
        report.missing = ["GRU tf32 B=8 H=64: not reached"]
        report.limits, report.packed = limits, [packed]
        report.write()

    monkeypatch.setattr(suite, "busy_seconds", lambda: float("nan"))
    monkeypatch.setattr(bench_cuda, "against_itself", lambda: noise)
    monkeypatch.setattr(bench_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(bench_cuda, "description", lambda: {"card": "a GPU"})
    monkeypatch.setattr(bench_cuda, "measure", measure)
    path = tmp_path / "a.json"
    assert main(["run", "--suite", "cuda", "--quick", "--out", str(path)]) == 1
    content = json.loads(path.read_text())
    good, failed = content["rows"]
    assert (good["dtype"], good["mode"], good["threads"]) == ("tf32", "inference", None)
    assert good["peers"]["torch.nn"]["fusedrnn_ms"] == 2.0
    assert good["peers"]["torch.nn"]["ratio"] == 1.5
    assert failed["failed"] == "check: tensor 0: 1.0e+00"
    assert content["expected_rows"] == 3
    assert content["noise"]["GPU"]["low"] == pytest.approx(0.95)
    assert content["noise"]["GPU"]["noisy"] is True
    capsys.readouterr()
    assert main(["report", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "- card: a GPU" in printed
    assert "- GRU tf32 B=8 H=64: not reached" in printed
    assert any(
        line.startswith("- noise, GPU: half of the ratios of a call to itself are from 0.950")
        for line in printed
    )
    assert "- what: grid.sync, us: 1.5" in printed
    assert "- what: cluster barrier, us: 0.2" in printed
    assert (
        "| GRU | tf32 | 32, 100, 128 | inference | 3.000 "
        "| 4.000 (0.75x **slower**) | 1.500 (2.00x) |"
    ) in printed
    assert any(
        line.startswith("| 8, 512, 64 | inference | - | 3.000 | 2.000 |") for line in printed
    )
    assert main(["plot", str(path)]) == 0
    assert (tmp_path / "a-heatmap-tf32.svg").exists()


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("packed", "GRU tf32 packed no_grad, step: wrong"),
        ("lost", "GRU tf32 B=8 H=64 no_grad: out of memory"),
        ("rows", "GRU tf32 8x512x64 inference, block path: check: wrong"),
    ],
)
def test_the_cuda_suite_tells_every_failure(monkeypatch, tmp_path, capsys, where, failure):
    """Also of what has no row, and of a path that fusedrnn does not choose."""
    bench_cuda = suite.bench_cuda
    line = {"cell": "GRU", "number": "tf32", "mode": "no_grad"}
    line["device_ms"] = line["wall_ms"] = {"torch.nn": 3.0, "step": 2.0}
    row = line | {"batch": 8, "size": 64, "steps": 512, "chosen": "step", "rounds": 5}

    def measure(report, quick):
        report.rows = [row | {"failures": {"block": "wrong"} if where == "rows" else {}}]
        report.packed = [line | {"failures": {"step": "wrong"} if where == "packed" else {}}]
        report.lost = [failure] if where == "lost" else []
        report.write()

    even = common.Timing({"torch.nn": [1.0, 1.0], "fusedrnn": [1.0, 1.0]})
    monkeypatch.setattr(bench_cuda, "against_itself", lambda: even)
    monkeypatch.setattr(bench_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(bench_cuda, "description", lambda: {"card": "a GPU"})
    monkeypatch.setattr(bench_cuda, "measure", measure)
    path = tmp_path / "a.json"
    assert main(["run", "--suite", "cuda", "--out", str(path)]) == 1
    assert suite.failures(json.loads(path.read_text())) == [failure]
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index("Failed: 1.") + 1] == f"- {failure}"
    assert main(["report", str(path)]) == 0
    assert f"- {failure}" in capsys.readouterr().out.splitlines()


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["run", "--suite", "fast"], "argument --suite: invalid choice: 'fast'"),
        (["run", "--dtype", "float8"], "expected some of float32,float64,bfloat16, got 'float8'"),
        (["run", "--backends", "jax"], "expected some of loop,torch.compile,onnxruntime"),
        (["run", "--cells", "LSTM,CNN"], "expected some of LSTM,GRU,RNN, got 'LSTM,CNN'"),
        (["run", "--threads", "1,100000"], "the cores of this process, got 1,100000"),
        (["run", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["run", "--rounds", "2"], "expected at least 3 to show a spread, got 2"),
        (["run", "--shapes", "8x128"], "as in 8x100x128, got '8x128'"),
        (["run", "--shapes", "8x0x128"], "expected a whole number of at least 1, got '0'"),
        (["run", "--out", f"{__file__}/a.json"], "argument --out: cannot write"),
        (["run", "--out", str(ROOT)], "not a file"),
        (["run", "--quick"], "argument --quick: --suite quick does not take it"),
        (["run", "--suite", "workloads", "--shapes", "1x1x1"], "--suite workloads does not take"),
        (["run", "--suite", "workloads", "--names", "chess"], "got 'chess'"),
        (["report", "missing.json"], "cannot read missing.json: No such file or directory"),
        (["report", __file__], "not JSON"),
        (["plot", __file__], "not JSON"),
        (["compare", "missing.json", "missing.json"], "cannot read missing.json"),
    ],
)
def test_bad_input_is_told_before_any_work(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(suite, "Results", lambda *_: pytest.fail("started"))
    assert message in refused(capsys, *arguments)


def test_two_thread_counts_are_not_for_workloads(capsys, monkeypatch):
    monkeypatch.setattr(common, "cores", lambda: 2)
    message = "argument --threads: --suite workloads takes one number"
    assert message in refused(capsys, "run", "--suite", "workloads", "--threads", "1,2")


def test_without_a_gpu_the_cuda_suite_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "a.json"
    errors = refused(capsys, "run", "--suite", "cuda", "--out", str(out))
    assert "--suite cuda: no CUDA GPU was found" in errors
    assert not out.exists()


@pytest.mark.parametrize(("command", "library"), [("run", "rich"), ("plot", "matplotlib")])
def test_a_missing_library_is_named(monkeypatch, capsys, finished, command, library):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )
    arguments = [str(finished[0])] if command == "plot" else []
    assert f"needs {library}: pip install {library}" in refused(capsys, command, *arguments)


def test_a_missing_peer_is_named(monkeypatch, capsys, tmp_path):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name)
    )
    message = "argument --backends: onnxruntime: not installed: pip install onnx onnxruntime"
    assert message in refused(capsys, "run", "--backends", "onnxruntime")
    monkeypatch.delitem(peers.PEERS, "torch.compile")  # takes seconds
    path = tmp_path / "a.json"
    assert main(["run", *SMALL, "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "missing: onnxruntime: not installed: pip install onnx onnxruntime" in printed
    assert "- onnxruntime, in every row: not installed" in printed


def test_a_file_of_another_schema_is_refused(finished, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(finished[1] | {"schema": 0}))
    assert "is not a file of `python -m benchmarks run` (schema 1)" in refused(
        capsys, "report", str(path)
    )
    path.write_text(json.dumps(finished[1] | {"rows": []}))
    assert "has no timed row of a layer" in refused(capsys, "plot", str(path))
