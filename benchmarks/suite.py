"""The suites of `python -m benchmarks run`: which rows each has, how a row is checked and measured,
and the JSON file that grows with every row.

A row is a layer or cell, a dtype, a shape, a number of threads and a mode. In it each peer takes
turns with fusedrnn alone, in one process: idle threads of one runtime may still spin in another's
turn, and a third would be timed on what cores that leaves. A layer is a model's first: its input
needs no gradient. A cell is one in the middle of a loop: all its arguments do.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

import fusedrnn

from . import bench_cuda, common, limits, memory, peers
from .limits import Limits
from .workloads import (
    captioning,
    char_lm,
    classify,
    dialogue,
    forecast,
    gradient_flow,
    prefix_sum,
    seq2seq,
    video,
)
from .workloads.common import missed

SCHEMA = 1  # of the JSON
DTYPES = ("float32", "float64", "bfloat16")
MODES = {"inference": "no_grad", "training": "forward+backward"}  # their names here and in common
KEY = ("cell", "dtype", "batch", "steps", "size", "threads", "mode")  # what tells rows apart
NOISE_ROUNDS = 21
NOISE_BOUND = 0.03  # of the ratio of a call to itself; on an idle machine its quartiles are nearer
OTHERS_BOUND = 0.05  # of the time of all CPUs
# Environment variables that leave a library fewer instructions or kernels than the machine has.
LIMITING = (
    "FUSEDRNN_ISA",
    "FUSEDRNN_KERNEL",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)
LOOP_MS = 200.0  # where a call of torch.nn takes longer, the Python loop is left out

Shape = tuple[int, int, int]  # B, T, H; and I = H
FIRST_SHAPES: tuple[Shape, ...] = ((1, 100, 32), (1, 100, 128), (1, 100, 512), (8, 100, 128))
SHAPES: tuple[Shape, ...] = (*FIRST_SHAPES, (32, 100, 256), (64, 50, 512), (64, 50, 1024))
COMPILED_SHAPES: tuple[Shape, ...] = ((8, 10, 128),)  # short enough for torch.compile
CELL_SHAPES: tuple[Shape, ...] = tuple((b, 1, h) for b, h in common.CELL_SHAPES)
MAP_SHAPES: tuple[Shape, ...] = tuple(
    (batch, 100, size) for batch in (1, 8, 32, 128) for size in (32, 128, 256, 512)
)


@dataclass(frozen=True)
class Suite:
    """Of the CPU."""

    shapes: tuple[Shape, ...]  # in every dtype
    cell_shapes: tuple[Shape, ...]  # in every dtype
    map_shapes: tuple[Shape, ...]  # for the heat maps: float32, the fewest rounds
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float  # after these two that take turns start no further round


SUITES = {
    "quick": Suite((*FIRST_SHAPES, (32, 100, 256)), CELL_SHAPES[:1], (), DTYPES[:1], 5, 1.5),
    "cpu": Suite((*SHAPES, *COMPILED_SHAPES), CELL_SHAPES, MAP_SHAPES, DTYPES, 9, 4.0),
}
WORKLOADS = {
    "char_lm": char_lm.main,
    "classify": classify.main,
    "seq2seq": seq2seq.main,
    "captioning": captioning.main,
    "video": video.main,
    "prefix_sum": prefix_sum.main,
    "gradient_flow": gradient_flow.main,
    "forecast": forecast.main,
    "dialogue": dialogue.main,
}


@dataclass(frozen=True)
class Row:
    """What is measured in a row."""

    cell: str
    dtype: str
    shape: Shape
    threads: int
    mode: str
    rounds: int

    @property
    def key(self) -> dict[str, Any]:
        values = (self.cell, self.dtype, *self.shape, self.threads, self.mode)
        return dict(zip(KEY, values, strict=True))

    @property
    def is_cell(self) -> bool:
        return self.cell.endswith("Cell")

    @property
    def weight_hh(self) -> int:
        """Its elements; weight_ih has as many."""
        return peers.GATES[self.cell.removesuffix("Cell")] * self.shape[2] ** 2

    @property
    def gflop(self) -> float:
        """Of all products: 2 B T (weight_ih + weight_hh) forward.

        Backward has the gradients of both weights, of the states, and of a cell's input.
        """
        batch, steps, _ = self.shape
        forward_products, backward_products = 2, 4 if self.is_cell else 3
        products = forward_products + (backward_products if self.mode == "training" else 0)
        return 2 * batch * steps * self.weight_hh * products / 1e9

    @property
    def gbytes(self) -> float:
        """What a pass forward, and as much again one backward, reads and writes at least, if
        weight_hh is read at every step, and weight_ih, the input and the output move once.
        """
        batch, steps, size = self.shape
        numbers = self.weight_hh * (steps + 1) + 2 * batch * steps * size
        passes = 2 if self.mode == "training" else 1
        itemsize: int = getattr(torch, self.dtype).itemsize
        return passes * numbers * itemsize / 1e9

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.cell} {self.dtype} {shape} {self.mode}, threads: {self.threads}"


def rows(
    suite: Suite,
    threads: Sequence[int],
    dtypes: Sequence[str] | None = None,
    cells: Sequence[str] = common.CELLS,
    shapes: Sequence[Shape] | None = None,
    rounds: int | None = None,
) -> list[Row]:
    """Rows that share tensors stand together. `shapes` are instead of the suite's, of cells too."""
    found = []
    for name, dtype in itertools.product(cells, dtypes or suite.dtypes):
        maps = [s for s in suite.map_shapes if s not in suite.shapes and dtype == "float32"]
        of_layers = dict.fromkeys(suite.shapes, suite.rounds) | dict.fromkeys(
            maps, common.MIN_ROUNDS
        )
        of_cells = dict.fromkeys(suite.cell_shapes, suite.rounds)
        if shapes is not None:
            of_layers = dict.fromkeys((s for s in shapes if s[1] > 1), suite.rounds)
            of_cells = dict.fromkeys((s for s in shapes if s[1] == 1), suite.rounds)
        for cell, each in ((name, of_layers), (f"{name}Cell", of_cells)):
            found += [
                Row(cell, dtype, shape, count, mode, rounds or default)
                for shape, default in each.items()
                for count in threads
                for mode in MODES
            ]
    return found


# The machine --------------------------------------------------------------------------------------


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(threads: Sequence[int]) -> dict[str, Any]:
    return {
        "cpu": common.cpu_model(),
        "cores": common.cores(),
        "isa": fusedrnn.isa(),
        "limited": {name: os.environ[name] for name in LIMITING if name in os.environ},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": list(threads),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "python": platform.python_version(),
        "commit": common.commit(),
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def busy_seconds() -> float:
    """What all CPUs together have worked since the start of the system; NaN if it does not tell."""
    try:
        text = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return math.nan
    user, nice, system, _, _, *interrupts = map(int, text.split()[1:9])  # without idle and iowait
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def against_itself() -> common.Timing:
    """A call of torch.nn and the same call, in turns."""
    call = common.make_cases("LSTM", 8, 128, inner=False)["torch.nn"].call("no_grad")
    with common.grad_mode("no_grad"):
        return common.interleave({"torch.nn": call, "fusedrnn": call}, NOISE_ROUNDS)


def measure_noise(turns: Callable[[], common.Timing] = against_itself) -> dict[str, Any]:
    """The quartiles of the time of a call of torch.nn over that of the same call, in turns, and the
    share of all CPUs that other programs took meanwhile.
    """
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    timing = turns()
    seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
    used = busy_seconds() - busy - (time.process_time() - own)
    others = None if math.isnan(used) else max(0.0, used / seconds)
    low, high = timing.quartiles()
    noisy = max(high - 1, 1 - low) > NOISE_BOUND or (others or 0) > OTHERS_BOUND
    return {"low": low, "high": high, "others": others, "noisy": noisy}


# A row --------------------------------------------------------------------------------------------


def what_ran(before: dict[str, int]) -> str:
    """What has computed fusedrnn's calls since `before`; "kernels" if nothing else has."""
    names = [name for name, count in fusedrnn.ops.counts.items() if count > before[name]]
    only_kernels = all(name.startswith("kernel") for name in names)
    return "kernels" if names and only_kernels else ", ".join(names) or "nothing"


def take_turns(
    row: Row, ours: common.Case, theirs: peers.Peer, name: str, seconds: float
) -> dict[str, Any]:
    """Milliseconds of both, and how many times faster fusedrnn is."""
    mode = MODES[row.mode]
    with common.grad_mode(mode):
        calls: dict[str, Callable[[], Any]] = {name: theirs.call(mode), "fusedrnn": ours.call(mode)}
        timing = common.interleave(calls, row.rounds, seconds)
    return {
        "ms": timing.ms(name),
        "fusedrnn_ms": timing.ms("fusedrnn"),
        "ratio": timing.speedup(name),
        "quartiles": timing.quartiles(name),
        "rounds": len(timing.rounds[name]),
        "crowded": timing.crowded,
    }


def measure_row(
    row: Row,
    cases: dict[str, common.Case],
    expected: Sequence[Tensor],
    limit: Limits,
    backends: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """A row's entry of the JSON. `expected` is what float64 gives; what is wrong is not timed."""
    mode, ours, theirs = MODES[row.mode], cases["fusedrnn"], cases["torch.nn"]
    entry: dict[str, Any] = {**row.key, "peers": {}}
    try:
        draw = partial(make_cases, row.cell, row.dtype, row.shape)
        common.check_values(cases, mode, expected, draw)
    except RuntimeError as error:
        return entry | {"failed": f"check: {error}"}
    before = dict(fusedrnn.ops.counts)
    entry["peers"]["torch.nn"] = timed = take_turns(row, ours, theirs, "torch.nn", seconds)
    entry["ran"] = what_ran(before)
    entry |= shares(row, timed["fusedrnn_ms"] / 1e3, timed["ms"] / 1e3, limit)
    if row.mode == "training":
        entry["memory"] = memory.of(cases)
    for name in backends:
        if not peers.applies(name, row.cell, row.dtype, mode):
            continue
        try:
            if name == "loop" and timed["ms"] > LOOP_MS:
                raise peers.Unavailable(f"a call of torch.nn takes more than {LOOP_MS:.0f} ms")
            peer = peers.PEERS[name](theirs, mode, row.threads)
            peers.check(peer, mode, expected, theirs.input.dtype)
            entry["peers"][name] = take_turns(row, ours, peer, name, seconds)
        except peers.Unavailable as reason:
            entry["peers"][name] = {"missing": str(reason)}
        except RuntimeError as error:
            entry["peers"][name] = {"failed": f"check: {error}"}
    return entry


def shares(row: Row, ours: float, theirs: float, limit: Limits) -> dict[str, Any]:
    """Of the rates that limits.py measures, for calls that take `ours` and `theirs` seconds.

    of_l2, with B = 1: the bytes of weight_hh, every step and every step back, a second. weight_ih
    is not in it, as one read of it can serve many steps.
    """
    batch, steps, _ = row.shape
    found = {
        "gflops": row.gflop / ours,
        "torch_gflops": row.gflop / theirs,
        "of_gemm": row.gflop / ours / limit.gemm[row.dtype],
        "flop_per_byte": row.gflop / row.gbytes,
    }
    if batch == 1 and not row.is_cell:
        weight_hh = row.weight_hh * getattr(torch, row.dtype).itemsize
        read = weight_hh * steps * (2 if row.mode == "training" else 1)
        found["of_l2"] = read / ours / 1e9 / limit.l2
        found["beyond_l2"] = weight_hh > limit.l2_bytes
    return found


# A run --------------------------------------------------------------------------------------------


class Results:
    """What was found so far, in the file `path`: valid JSON at any time."""

    def __init__(self, path: Path, suite: str, threads: Sequence[int]) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "suite": suite,
            "complete": False,
            "environment": environment(threads),
            "missing": peers.missing(),
            "left_out": [],  # peers that were not asked for
            "noise": {},
            "limits": {},
            "expected_rows": 0,
            "rows": [],
            "workloads": [],
        }
        self.write()

    def write(self) -> None:
        common.write_whole(self.path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")

    @property
    def failures(self) -> list[str]:
        return failures(self.content)


def name_of(row: dict[str, Any]) -> str:
    shape = "x".join(str(row[name]) for name in ("batch", "steps", "size"))
    threads = "" if row["threads"] is None else f", threads: {row['threads']}"
    return f"{row['cell']} {row['dtype']} {shape} {row['mode']}{threads}"


def failures(content: dict[str, Any]) -> list[str]:
    """Failed checks and exceptions of all rows, of peers too, and of workloads, and thresholds that
    whole trainings have not reached."""
    found = []
    for row in content["rows"]:
        found += [f"{name_of(row)}: {row['failed']}"] if "failed" in row else []
        found += [
            f"{name_of(row)}, {name}: {peer['failed']}"
            for name, peer in row["peers"].items()
            if "failed" in peer
        ]
    for record in content["workloads"]:
        lines = [record["failed"]] if "failed" in record else missed(record)
        found += [f"{record['name']}: {line}" for line in lines]
    if "cuda" in content:  # what has no row
        found += bench_cuda.failures(content["cuda"]["packed"]) + content["cuda"]["lost"]
    return found


@contextmanager
def progress(total: float) -> Iterator[Any]:
    """A bar on stderr, with the time left. `total` is in estimated seconds."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = [
        BarColumn(10),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("gone,"),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left: {task.description}"),
    ]
    bars = Progress(
        *columns,
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # else rich would take what goes into a file
        transient=True,
        speed_estimate_period=120,
    )
    with bars:
        task = bars.add_task("", total=total)

        def step(done: float, text: str) -> None:
            bars.update(task, advance=done, description=text)

        yield step


def estimate(row: Row, limit: Limits, backends: Sequence[str], seconds: float) -> float:
    """Roughly, in seconds; only the shares of the rows matter."""
    call = row.gflop / limit.gemm[row.dtype]
    sides = 2 * (1 + sum(peers.applies(b, row.cell, row.dtype, MODES[row.mode]) for b in backends))
    pair = min(row.rounds * max(call, common.ROUND_NS / 1e9), max(seconds, 3 * call))
    return sides * (pair + 3 * call) + (2 if row.is_cell and "torch.compile" in backends else 0)


def run_rows(
    results: Results, todo: Sequence[Row], backends: Sequence[str], seconds: float
) -> None:
    """Measures all rows; each is in the file before the next begins."""
    content = results.content
    content["expected_rows"] = len(todo)
    content["left_out"] = [
        name for name in peers.PEERS if name not in backends and name not in content["missing"]
    ]
    measured = {}
    for threads in content["environment"]["threads"]:
        with common.threads(threads):
            content["noise"][str(threads)] = measure_noise()
            measured[threads] = limits.measure(threads, sorted({row.dtype for row in todo}))
        content["limits"][str(threads)] = asdict(measured[threads])
    results.write()
    print("\n".join(start_lines(content)), flush=True)
    backends = [name for name in backends if name not in content["missing"]]
    costs = [estimate(row, measured[row.threads], backends, seconds) for row in todo]
    done = 0
    with progress(sum(costs)) as step, common.frozen_heap():
        for (cell, dtype, shape), group in itertools.groupby(
            todo, lambda row: (row.cell, row.dtype, row.shape)
        ):
            cases = expected = None
            for row in group:
                step(costs[done - 1] if done else 0, f"{done + 1}/{len(todo)} {row}")
                try:
                    with common.threads(row.threads):
                        if cases is None or expected is None:
                            cases = make_cases(cell, dtype, shape)
                            expected = common.exact(cases["torch.nn"], MODES["training"])
                        entry = measure_row(
                            row, cases, expected, measured[row.threads], backends, seconds
                        )
                except Exception as error:  # one row's, whatever it is: the others go on
                    entry = {**row.key, "peers": {}, "failed": peers.error_line(error)}
                content["rows"].append(entry)
                results.write()
                print(row_line(entry), flush=True)
                done += 1


def make_cases(cell: str, dtype: str, shape: Shape, seed: int = 0) -> dict[str, common.Case]:
    batch, steps, size = shape
    inner = cell.endswith("Cell")
    return common.make_cases(cell, batch, size, steps, getattr(torch, dtype), inner, seed)


def run_workloads(results: Results, names: Sequence[str], arguments: Sequence[str]) -> None:
    """Trains each with torch.nn and fusedrnn; their texts and pictures are left beside the JSON."""
    content = results.content
    content["expected_rows"] = len(names)
    (threads,) = content["environment"]["threads"]
    with common.threads(threads):
        content["noise"][str(threads)] = measure_noise()
    print("\n".join(start_lines(content)), flush=True)
    folder = results.path.parent / f"{results.path.stem}-workloads"
    for number, name in enumerate(names, 1):
        print(f"\n{number}/{len(names)}: {name}", flush=True)
        start = time.perf_counter()
        try:
            record = WORKLOADS[name]([*arguments, "--out", str(folder)])
        except (Exception, SystemExit) as error:  # one workload's: the others go on
            record = {"name": name, "failed": peers.error_line(error)}
        content["workloads"].append(record | {"seconds": time.perf_counter() - start})
        results.write()


class CudaReport(bench_cuda.Report):
    """bench_cuda's report, as rows of ours: device time of the path that fusedrnn chooses."""

    def __init__(self, results: Results) -> None:
        super().__init__(results.path.parent, bench_cuda.description())
        self.results = results

    def write(self) -> None:
        content = self.results.content
        content["expected_rows"] = len(self.rows) + len(self.missing) + len(self.lost)
        content["rows"] = [cuda_row(entry) for entry in self.rows]
        content["cuda"] = {
            "machine": self.machine,
            "limits": self.limits,
            "packed": self.packed,
            "lost": self.lost,
            bench_cuda.NOT_REACHED: self.missing,
        }
        self.results.write()


def cuda_row(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of bench_cuda's as one of the JSON."""
    names = {mode: name for name, mode in MODES.items()}
    values = (
        *(entry[name] for name in ("cell", "number", "batch", "steps", "size")),
        None,
        names[entry["mode"]],
    )
    row: dict[str, Any] = dict(zip(KEY, values, strict=True)) | {"peers": {}}
    chosen = entry["chosen"]
    row["peers"] |= {
        f"{path} path": {"failed": f"check: {failure}"}
        for path, failure in entry["failures"].items()
        if path != chosen
    }
    if chosen not in entry["device_ms"]:
        return row | {"failed": f"check: {entry['failures'].get(chosen, 'not timed')}"}
    device, wall = entry["device_ms"], entry["wall_ms"]
    timed = {"ms": device[bench_cuda.THEIRS], "fusedrnn_ms": device[chosen]}
    timed |= {"ratio": timed["ms"] / timed["fusedrnn_ms"], "rounds": entry["rounds"]}
    timed |= {"wall_ms": wall[bench_cuda.THEIRS], "fusedrnn_wall_ms": wall[chosen]}
    row["peers"]["torch.nn"] = timed
    ran = "torch.nn" if chosen == "torch" else f"kernels, {chosen} path"
    return row | {
        "ran": ran,
        "memory": entry.get("memory", {}),
        "device_ms": device,  # of every path
        "cudnn": entry.get("cudnn", []),
    }


def run_cuda(results: Results, quick: bool) -> None:
    results.content["noise"]["GPU"] = measure_noise(bench_cuda.against_itself)
    print("\n".join(start_lines(results.content)), flush=True)
    report = CudaReport(results)
    bench_cuda.measure(report, quick)
    print("\n".join(map(row_line, results.content["rows"])))


class Terminated(BaseException):
    """SIGTERM has come."""


def terminate(number: int, frame: Any) -> None:
    raise Terminated


@contextmanager
def saved_when_interrupted(results: Results) -> Iterator[dict[str, int]]:
    """Gives {"code": 0}, which is 130 after Ctrl-C and 143 after SIGTERM; ends both here."""
    outcome = {"code": 0}
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield outcome
        results.content["complete"] = True
        results.write()
    except (KeyboardInterrupt, Terminated) as end:
        outcome["code"] = 130 if isinstance(end, KeyboardInterrupt) else 143
        done = len(results.content["rows"]) + len(results.content["workloads"])
        total = results.content["expected_rows"]
        print(f"interrupted: {done} of {total} rows are in {results.path}", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


# What is printed ----------------------------------------------------------------------------------


def ratio(value: float) -> str:
    """How many times faster fusedrnn is; a loss is marked, one by rounding only is not hidden."""
    return f"{value:.2f}" + (" **slower**" if value < 1 else "")


def start_lines(content: dict[str, Any]) -> list[str]:
    """The environment, limits and noise, one fact a line."""
    machine = content["environment"]
    lines = [
        f"- CPU: {machine['cpu']}, {machine['cores']} cores; kernels for {machine['isa']}",
        f"- GPU: {machine['gpu'] or 'none'}",
        f"- torch {machine['torch']}, onnxruntime {machine['onnxruntime'] or 'not installed'}, "
        f"Python {machine['python']}; threads: {', '.join(map(str, machine['threads']))}",
        f"- commit {machine['commit']}; {machine['date']}, load average at the start "
        f"{machine['load_average']}",
    ]
    if limited := machine.get("limited"):
        settings = ", ".join(f"{name}={value}" for name, value in limited.items())
        lines.append(f"- limited by the environment: {settings}")
    lines += [f"- missing: {name}: {why}" for name, why in content["missing"].items()]
    for count, limit in content["limits"].items():
        gemm = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in limit["gemm"].items())
        lines.append(
            f"- limits, threads: {count}: torch.mm {gemm} GFLOP/s; "
            f"L2 {limit['l2']:.0f} GB/s, memory {limit['memory']:.0f} GB/s"
        )
    for count, noise in content["noise"].items():
        where = f"threads: {count}" if count.isdecimal() else count
        others = "unknown" if noise["others"] is None else f"{noise['others']:.0%}"
        lines.append(
            f"- noise, {where}: half of the ratios of a call to itself are from "
            f"{noise['low']:.3f} to {noise['high']:.3f}; others' share of all CPUs: {others}"
        )
    timed = [peer for row in content["rows"] for peer in row.get("peers", {}).values()]
    if crowded := sum(peer.get("crowded", 0) for peer in timed):
        rounds = sum(peer.get("rounds", 0) for peer in timed)
        lines.append(f"- threads shared a core in {crowded} of {rounds} rounds")
    if any(noise["noisy"] for noise in content["noise"].values()):
        lines.append(
            f"- **THIS MACHINE IS BUSY OR NOISY** (ratios further than {NOISE_BOUND:.0%} from 1 or "
            f"others' share above {OTHERS_BOUND:.0%}): the times are not to be relied on"
        )
    return lines


def row_line(row: dict[str, Any]) -> str:
    """A row in one line of the terminal."""
    if "failed" in row:
        return f"{name_of(row)}: FAILED, {row['failed']}"
    theirs = row["peers"]["torch.nn"]
    text = f"{name_of(row)}: {theirs['ms']:.3f} to {theirs['fusedrnn_ms']:.3f} ms, "
    text += ratio(theirs["ratio"]).replace("**", "")
    if "quartiles" in theirs:
        text += " ({:.2f} to {:.2f})".format(*theirs["quartiles"])
    for name, peer in row["peers"].items():
        if "failed" in peer:
            text += f"; {name} FAILED"
        elif name != "torch.nn" and "ratio" in peer:
            text += f"; {name} {ratio(peer['ratio'])}".replace("**", "")
    return text + ("" if row["ran"].startswith("kernels") else f"; RAN: {row['ran']}")


@dataclass
class Mean:
    """Of the ratios to one peer, over shapes."""

    ratios: list[float]
    shapes: list[str]

    @property
    def value(self) -> float:
        return geometric_mean(self.ratios)

    @property
    def lowest(self) -> tuple[float, str]:
        return min(zip(self.ratios, self.shapes, strict=True))

    @property
    def losses(self) -> int:
        return sum(value < 1 for value in self.ratios)


def means(content: dict[str, Any]) -> dict[tuple[Any, ...], Mean]:
    """By cell, dtype, mode, threads and peer."""
    found: dict[tuple[Any, ...], Mean] = {}
    for row in content["rows"]:
        shape = ", ".join(str(row[name]) for name in ("batch", "steps", "size"))
        for name, peer in row["peers"].items():
            if "ratio" in peer:
                key = (row["cell"], row["dtype"], row["mode"], row["threads"], name)
                mean = found.setdefault(key, Mean([], []))
                mean.ratios.append(peer["ratio"])
                mean.shapes.append(shape)
    return dict(sorted(found.items()))
