"""benchmarks/bench_cuda.py where there is no GPU, what one would measure made up; and that
cuda_limits.cu compiles.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from benchmarks import bench_cuda, common

ROOT = Path(__file__).resolve().parents[1]
ROWS = bench_cuda.rows([(8, 64)])[:3]


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


class Clock:
    """Every call takes a millisecond."""

    def device(self, call, host_ms):
        call()
        return 1.0

    def wall(self, call):
        call()
        return 1.0, 0.5


def line(**more):
    """What rows and packed lines have in the JSON."""
    times = {"torch.nn": 3.0, "step": 2.0, "block": 1.0}
    return {"device_ms": times, "wall_ms": times, "rounds": 5, "failures": {}, **more}


def entry(row, **more):
    return line(**vars(row), steps=bench_cuda.STEPS, chosen="step", **more)


def packed(clock, cell, number, mode):
    return line(cell=cell, number=number, mode=mode)


@pytest.fixture
def report(tmp_path):
    return bench_cuda.Report(tmp_path, {"card": "a GPU"})


def written(report):
    """The JSON as it is now, and the lines of the markdown."""
    text, lines = (report.directory / f"cuda.{kind}" for kind in ("json", "md"))
    return json.loads(text.read_text()), lines.read_text().splitlines()


def test_every_row_is_written_before_the_next(monkeypatch, report):
    """The second is lost: that is written as well."""
    before = []

    def measured(problem, row, *_):
        content, _ = written(report)
        before.append((len(content["rows"]), len(content["lost"]), len(content["not reached"])))
        if row is ROWS[1]:
            raise RuntimeError("out of memory\nand more")
        return entry(row)

    monkeypatch.setattr(bench_cuda, "Problem", lambda *what: what)
    monkeypatch.setattr(bench_cuda, "measured", measured)
    bench_cuda.grid(report, ROWS, Clock(), float("inf"))
    assert before == [(0, 0, 3), (1, 0, 2), (1, 1, 1)]
    content, lines = written(report)
    assert len(content["rows"]) == 2
    assert content["lost"] == [f"{ROWS[1]}: out of memory"]
    assert f"- {ROWS[1]}: out of memory" in lines


def test_every_packed_line_is_written_before_the_next(monkeypatch, report):
    """The second is lost, as a row is."""
    before = []

    def counted(*arguments):
        content, _ = written(report)
        before.append((len(content["packed"]), len(content["lost"])))
        if len(before) == 2:
            raise RuntimeError("out of memory\nand more")
        return packed(*arguments)

    monkeypatch.setattr(bench_cuda, "Clock", Clock)
    monkeypatch.setattr(bench_cuda, "packed", counted)
    monkeypatch.setattr(bench_cuda, "grid", lambda *_: None)
    bench_cuda.measure(report, quick=True)
    assert before == [(0, 0), (1, 0), (1, 1), (2, 1), (3, 1), (4, 1)]
    content, _ = written(report)
    assert len(content["packed"]) == 5
    assert content["lost"] == [f"LSTM bfloat16 packed {common.MODES[1]}: out of memory"]


@pytest.mark.parametrize(
    ("where", "found", "told"),
    [
        (None, None, None),
        ("missing", "a row: not reached", "- a row: not reached"),
        ("lost", "a row: out of memory", "- a row: out of memory"),
        (
            "rows",
            entry(ROWS[0], failures={"block": "wrong"}),
            "- LSTM bfloat16 B=8 H=64 no_grad, block: wrong",
        ),
        (
            "packed",
            line(cell="GRU", number="tf32", mode="no_grad", failures={"step": "wrong"}),
            "- GRU tf32 packed no_grad, step: wrong",
        ),
    ],
)
def test_what_failed_or_is_lost_is_in_the_exit_code(
    monkeypatch, tmp_path, capsys, where, found, told
):
    """What there was no time for is not: it is only said."""

    def measure(report, *_):
        report.rows.append(entry(ROWS[1]))
        if where:
            getattr(report, where).append(found)

    monkeypatch.setattr(bench_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(bench_cuda, "description", lambda: {"card": "a GPU"})
    monkeypatch.setattr(bench_cuda, "measure", measure)
    code = bench_cuda.main(["--out", str(tmp_path)])
    assert code == int(where not in (None, "missing"))
    assert told is None or told in capsys.readouterr().out.splitlines()


def test_noise_is_of_torch_nn_alone(monkeypatch):
    """On the CPU, where bench_cuda's tensors can be as well."""
    calls = []
    monkeypatch.setattr(bench_cuda, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_cuda, "STEPS", 2)
    monkeypatch.setattr(bench_cuda, "NOISE_SECONDS", float("inf"))
    monkeypatch.setattr(bench_cuda, "Clock", Clock)
    forward = torch.nn.LSTM.forward
    monkeypatch.setattr(
        torch.nn.LSTM, "forward", lambda *args: calls.append(args[0]) or forward(*args)
    )
    counts = dict(fusedrnn.ops.counts)
    timing = bench_cuda.against_itself()
    assert isinstance(timing, common.Timing)
    assert timing.quartiles() == (1.0, 1.0)
    assert len(timing.rounds["fusedrnn"]) == bench_cuda.ROUNDS
    assert len(calls) == 2 * (1 + 2 * bench_cuda.ROUNDS)
    assert len(set(calls)) == 1
    assert fusedrnn.ops.counts == counts


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_limits_compile(tmp_path, architecture):
    command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-Werror=all-warnings"]
    command += ["-I", ROOT / "csrc" / "cuda", "-cubin", ROOT / "benchmarks" / "cuda_limits.cu"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "cuda_limits.cubin"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
