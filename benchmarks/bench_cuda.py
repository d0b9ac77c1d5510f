"""fusedrnn's CUDA kernels against torch.nn's, which are cuDNN's, on one GPU:
`python -m benchmarks.bench_cuda [--out DIR] [--quick]`, some seven minutes.

Both paths, step and block, whatever fusedrnn/cuda.py would choose; then what it should choose, as a
table. Results and gradients are checked before they are timed, against torch.nn in float64. Device
time is that of the GPU alone, behind a pause in which the host queues all work; wall time is a
call's, from an idle GPU to an idle GPU. With nvcc also the GPU's own limits (cuda_limits.cu).

Written into DIR, cuda.json and cuda.md, after each case, so that an end by force loses nothing.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import cuda

from . import common, memory
from .common import Timing, commit

DEVICE = torch.device("cuda")
STEPS = 512
SHAPES = (  # (B, H), in order of importance; the slowest last
    *((1, 128), (16, 256), (32, 512), (64, 512), (64, 1024), (16, 768)),
    *((batch, size) for size in (64, 96, 128, 160, 192) for batch in (1, 8, 64)),
    *((128, 1024), (64, 2048)),
)
QUICK_SHAPES = ((1, 128), (64, 128), (64, 512))
NUMBERS = {  # in order of importance
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "float16": torch.float16,
    "float32": torch.float32,
}
MODES = common.MODES
# By name: cuda.forced. Only where cuda.py chooses so: "mixed", one path forward and another one
# backward, and "torch", where it leaves the call to torch.nn.
PATHS = {"step": "step", "block": "block", "mixed": "", "torch": ""}
THEIRS = "torch.nn"
ROUNDS = 15  # at most
MIN_ROUNDS = common.MIN_ROUNDS
SECONDS, QUICK_SECONDS = 380, 60  # of all together
NAMES_PART = 0.1  # of them, for the names of cuDNN's kernels
LIMITS_SECONDS = 90
PACKED = (32, 100, 128)  # B, T, H
PACKED_SECONDS = 0.3  # of a line
NOISE_SECONDS = 1.0
PAUSE_MS = 30.0  # at most: behind it the queue of kernels is full in any case
TOO_LARGE = "FUSEDRNN_KERNEL=block"  # how cuda.py's error begins
NOT_REACHED, FAILED = "not reached", "check failed"


# The GPU ------------------------------------------------------------------------------------------


def card() -> str:
    return torch.cuda.get_device_name()


def description() -> dict[str, Any]:
    """The machine that all times are of."""
    major, minor = torch.cuda.get_device_capability()
    names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        smi = dict(zip(names, map(str.strip, text.strip().split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError):
        smi = dict.fromkeys(names, "unknown")
    return {
        "card": card(),
        "compute capability": f"{major}.{minor}",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        **smi,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "CPU": common.cpu_model(),
        "fusedrnn": commit(),
        "date": str(datetime.date.today()),
    }


def directory_of(name: str) -> Path:
    """The card's folder under benchmarks/results."""
    return common.REPOSITORY / "benchmarks" / "results" / re.sub(r"\W+", "-", name.lower())


class Clock:
    """Milliseconds of a call: on the GPU alone, and from the host."""

    def __init__(self) -> None:
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        cycles = 20_000_000
        # The most of a few: clocks rise at first.
        times = [self._between(lambda: torch.cuda._sleep(cycles)) for _ in range(5)]
        self.cycles_per_ms = cycles / min(times)

    @staticmethod
    def _between(call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def device(self, call: Callable[[], Any], host_ms: float) -> float:
        """Of the GPU alone, for a call that keeps the host busy for host_ms."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(1.3 * host_ms + 0.1, PAUSE_MS) * self.cycles_per_ms))
        return self._between(call)

    @staticmethod
    def wall(call: Callable[[], Any]) -> tuple[float, float]:
        """(until the GPU is idle again, until the host has queued all)."""
        torch.cuda.synchronize()
        start = perf_counter()
        call()
        queued = perf_counter()
        torch.cuda.synchronize()
        return (perf_counter() - start) * 1e3, (queued - start) * 1e3


def take_turns(
    clock: Clock, calls: dict[str, Callable[[], Any]], seconds: float
) -> tuple[Timing, Timing]:
    """(device, wall) of rounds in which all run, every second one backwards.

    No round starts after `seconds`, but for MIN_ROUNDS of them: so slow cases have the fewest.
    """
    host = {name: clock.wall(call)[1] for name, call in calls.items()}
    timings = Timing({name: [] for name in calls}), Timing({name: [] for name in calls})
    start = perf_counter()
    for done in range(ROUNDS):
        if done >= MIN_ROUNDS and perf_counter() - start > seconds:
            break
        for name in list(calls)[:: -1 if done % 2 else 1]:
            timings[0].rounds[name].append(clock.device(calls[name], host[name]))
            wall, host[name] = clock.wall(calls[name])
            timings[1].rounds[name].append(wall)
    return timings


# Cases --------------------------------------------------------------------------------------------


@contextmanager
def kernels(tf32: bool) -> Iterator[None]:
    """Whether float32 products of all kinds are TF32; cuda.forced is as before at the end."""
    backends = torch.backends
    before = cuda.forced, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cuda.forced, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


class Case(common.Case):
    """common.Case of tensors that several numbers share; its gradient reaches the output."""

    def __init__(self, module: nn.Module, input: Tensor, grad: Tensor) -> None:
        self.module, self.inner, self.states, self.hx = module, True, [], None
        self.input, self.grads = input.detach().clone().requires_grad_(), [grad]
        self.leaves = [self.input, *module.parameters()]


@dataclass(frozen=True)
class Row:
    """What is timed."""

    cell: str
    batch: int
    size: int
    number: str
    mode: str

    def __str__(self) -> str:
        return f"{self.cell} {self.number} B={self.batch} H={self.size} {self.mode}"


def rows(shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """In order of importance; those of one cell and shape together, for they share tensors."""
    return [
        Row(cell, batch, size, number, mode)
        for batch, size in shapes
        for cell in common.CELLS
        for number in NUMBERS
        for mode in MODES
    ]


class Problem:
    """A cell and shape: the same values in every dtype, and what they give in float64."""

    def __init__(self, cell: str, batch: int, size: int) -> None:
        self.cell, self.size = cell, size
        torch.manual_seed(0)
        self.module = getattr(nn, cell)(size, size).to(DEVICE, torch.bfloat16)
        self.input, self.grad = torch.randn(
            2, STEPS, batch, size, device=DEVICE, dtype=torch.bfloat16
        )

    @cached_property
    def exact(self) -> Sequence[Tensor]:
        """Results and gradients in float64."""
        with kernels(tf32=False):
            return self._case(copy.deepcopy(self.module), torch.float64).values(MODES[1])

    def _case(self, module: nn.Module, dtype: torch.dtype) -> Case:
        return Case(module.to(dtype), self.input.to(dtype), self.grad.to(dtype))

    def cases(self, number: str) -> dict[str, Case]:
        """torch.nn's and fusedrnn's."""
        dtype = NUMBERS[number]
        ours = getattr(fusedrnn, self.cell)(self.size, self.size, device=DEVICE, dtype=dtype)
        ours.load_state_dict(self.module.state_dict())
        theirs = copy.deepcopy(self.module)
        return {THEIRS: self._case(theirs, dtype), "fusedrnn": self._case(ours, dtype)}

    def errors(self, values: Sequence[Tensor]) -> list[float]:
        """Of results and gradients, relative to the largest number of each."""
        return [
            ((v.double() - e).abs().max() / e.abs().max()).item()
            for v, e in zip(values, self.exact, strict=False)
        ]


def chosen(row: Row) -> str:
    """The one of PATHS that fusedrnn/cuda.py takes of itself."""
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[row.cell]
    dtype = NUMBERS[row.number]
    module = getattr(nn, row.cell)(row.size, row.size, device=DEVICE, dtype=dtype)
    input = torch.zeros(1, row.batch, row.size, device=DEVICE, dtype=dtype)
    cuda.forced = ""
    layer = cuda._Layer(cell, input, (), list(module.parameters()), None)
    if layer.choice(alone=True).path == "torch":
        return "torch"
    ways = {layer.block(backward) for backward in (False, True)[: 1 + MODES.index(row.mode)]}
    return "mixed" if len(ways) > 1 else "block" if ways.pop() else "step"


def check(problem: Problem, cases: dict[str, Case], row: Row, paths: list[str]) -> dict[str, Any]:
    """Removes from `paths` what cannot be timed; returns what was found.

    An error may be four times torch.nn's and some roundings: over so many steps two right results
    may be so far apart, and wrong ones are further.
    """
    theirs = problem.errors(cases[THEIRS].values(row.mode))
    eps = 2.0**-11 if row.number == "tf32" else torch.finfo(NUMBERS[row.number]).eps
    found: dict[str, Any] = {"errors": {THEIRS: theirs}, "failures": {}}
    wanted = {"kernel_forward": 1} | ({"kernel_backward": 1} if row.mode == MODES[1] else {})
    for path in tuple(paths):
        cuda.forced = PATHS[path]
        before = dict(fusedrnn.ops.counts)
        try:
            mine = problem.errors(cases["fusedrnn"].values(row.mode))
        except RuntimeError as error:
            paths.remove(path)
            if not str(error).startswith(TOO_LARGE):
                found["failures"][path] = str(error).splitlines()[0]
            continue
        ran = {n: c - before[n] for n, c in fusedrnn.ops.counts.items() if c > before[n]}
        found["errors"][path] = mine
        wrong = [
            f"tensor {i}: {m:.1e}, torch.nn's {t:.1e}"
            for i, (m, t) in enumerate(zip(mine, theirs, strict=True))
            if not m <= 4 * t + 4 * eps
        ]
        if ran != ({"torch": 1} if path == "torch" else wanted):
            wrong = [f"not one call of what was to run: {ran}"]
        if wrong:
            paths.remove(path)
            found["failures"][path] = wrong[0]
    return found


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """ "count x name" of the GPU's kernels in a call, the longest in all first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.self_device_time_total
            counts[event.name] += 1
    return [f"{counts[name]} x {name[:120]}" for name, _ in times.most_common(3)]


def call_by(path: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        cuda.forced = path
        return function()

    return call


def measured(problem: Problem, row: Row, clock: Clock, seconds: float) -> dict[str, Any]:
    """A row's entry of the JSON."""
    start = perf_counter()
    with kernels(row.number == "tf32"), common.grad_mode(row.mode):
        entry = {**vars(row), "steps": STEPS, "chosen": chosen(row)}
        paths = [path for path in PATHS if PATHS[path] or path == entry["chosen"]]
        cases = problem.cases(row.number)
        entry |= check(problem, cases, row, paths)
        calls = {THEIRS: cases[THEIRS].call(row.mode)}
        ours = cases["fusedrnn"].call(row.mode)
        calls |= {path: call_by(PATHS[path], ours) for path in paths}
        if row.mode == MODES[1]:
            cuda.forced = ""  # as chosen
            entry["memory"] = memory.of(cases, "cuda")
        return entry | times(clock, calls, seconds - (perf_counter() - start))


def times(clock: Clock, calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    device, wall = take_turns(clock, calls, seconds)
    return {
        "device_ms": {name: device.ms(name) for name in calls},
        "wall_ms": {name: wall.ms(name) for name in calls},
        "rounds": len(device.rounds[THEIRS]),
    }


def packed(clock: Clock, cell: str, number: str, mode: str) -> dict[str, Any]:
    """Sequences of lengths drawn evenly from 1 to T, in a PackedSequence."""
    batch, steps, size = PACKED
    torch.manual_seed(0)
    dtype = NUMBERS[number]
    lengths = torch.randint(1, steps + 1, (batch,))
    theirs = getattr(nn, cell)(size, size, device=DEVICE, dtype=dtype)
    ours = getattr(fusedrnn, cell)(size, size, device=DEVICE, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    padded = torch.randn(steps, batch, size, device=DEVICE, dtype=dtype)
    data, *rest = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    grad, data = torch.randn_like(data), data.requires_grad_(mode == MODES[1])

    def call(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            output = module(PackedSequence(data, *rest))[0].data
            if mode == MODES[0]:
                return output
            return torch.autograd.grad(output, [data, *module.parameters()], grad)[0]

        return run

    with kernels(number == "tf32"), common.grad_mode(mode):
        calls = {THEIRS: call(theirs)}
        calls |= {path: call_by(PATHS[path], call(ours)) for path in ("step", "block")}
        entry: dict[str, Any] = {"cell": cell, "number": number, "shape": PACKED, "mode": mode}
        entry["failures"] = {}
        expected = calls[THEIRS]()
        bound = 0.05 if number in ("bfloat16", "float16") else 1e-2
        for path in ("step", "block"):
            try:
                torch.testing.assert_close(calls[path](), expected, rtol=bound, atol=bound)
            except (RuntimeError, AssertionError) as error:
                del calls[path]
                if not str(error).startswith(TOO_LARGE):
                    entry["failures"][path] = str(error).splitlines()[0]
        return entry | times(clock, calls, PACKED_SECONDS)


def against_itself() -> Timing:
    """A call of torch.nn and the same call in turns, on the device: how far ratios scatter."""
    mode = MODES[0]
    call = Problem("LSTM", 8, 128).cases("float32")[THEIRS].call(mode)
    with kernels(tf32=False), common.grad_mode(mode):
        return take_turns(Clock(), {THEIRS: call, "fusedrnn": call}, NOISE_SECONDS)[0]


# Limits -------------------------------------------------------------------------------------------


def limits() -> list[dict[str, Any]] | str:
    """What cuda_limits.cu prints, or why there is nothing."""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        return "not measured: no nvcc"
    major, minor = torch.cuda.get_device_capability()
    source = common.REPOSITORY / "benchmarks" / "cuda_limits.cu"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "cuda_limits")
        build = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{major}{minor}{'a' if major == 9 else ''}"]
        build += ["-I", common.REPOSITORY / "csrc" / "cuda", source, "-o", program]
        for command in (build, [program]):
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=LIMITS_SECONDS
                )
            except subprocess.TimeoutExpired:
                return f"not measured: {Path(command[0]).name} took over {LIMITS_SECONDS} s"
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                return f"not measured: {last}"
    return [json.loads(text) for text in done.stdout.splitlines()]


# The report ---------------------------------------------------------------------------------------


def fastest(entry: dict[str, Any]) -> dict[str, Any]:
    """For the choice of a path: the fastest on the device, and what the present one loses."""
    times = entry["device_ms"]
    names = sorted(times, key=lambda name: times[name])
    ours = [times[name] for name in PATHS if name in times and name != "torch"]
    row = {key: entry[key] for key in ("cell", "number", "mode", "batch", "size", "chosen")}
    row["fastest"] = "torch" if names[0] in (THEIRS, "torch") else names[0]
    row["over the next"] = times[names[1]] / times[names[0]] if len(names) > 1 else None
    row["over torch"] = times[THEIRS] / min(ours) if ours else None
    if entry["chosen"] in times:
        row["chosen over fastest"] = times[entry["chosen"]] / times[names[0]]
    return row


def ratio(entry: dict[str, Any], path: str, kind: str) -> str:
    if path in entry["failures"]:
        return f"**{FAILED}**"
    times = entry[kind]
    if path not in times:
        return "-"
    value = times[THEIRS] / times[path]
    return f"{times[path]:.3f} ({value:.2f}x{' **slower**' if value < 1 else ''})"


def table_line(entry: dict[str, Any], shape: str) -> str:
    columns = [entry["cell"], entry["number"], shape]
    for kind in ("device_ms", "wall_ms"):
        columns += [f"{entry[kind][THEIRS]:.3f}", *(ratio(entry, path, kind) for path in PATHS)]
    return f"| {' | '.join(columns)} |"


def failures(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The failed checks of rows and of packed lines, a path each."""
    return [
        f"{e['cell']} {e['number']} "
        + (f"B={e['batch']} H={e['size']}" if "batch" in e else "packed")
        + f" {e['mode']}, {path}: {failure}"
        for e in entries
        for path, failure in e["failures"].items()
    ]


def limit_lines(found: list[dict[str, Any]] | str) -> list[str]:
    if isinstance(found, str):
        return [found]
    return ["- " + ", ".join(f"{k}: {v}" for k, v in each.items()) for each in found]


COLUMNS = (
    "| cell | number | B, H | torch.nn, device | step | block | mixed | torch "
    "| torch.nn, wall | step | block | mixed | torch |\n|---|---|---" + "|--:" * 10 + "|"
)


class Report:
    """What was found so far, in two files."""

    def __init__(self, directory: Path, machine: dict[str, Any]) -> None:
        self.directory, self.machine = directory, machine
        self.limits: list[dict[str, Any]] | str = "not measured"
        self.packed: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.lost: list[str] = []  # with the reason
        self.missing: list[str] = []

    @contextmanager
    def keeps_on(self, what: str) -> Iterator[None]:
        """An error inside, out of memory say, loses `what` and nothing else."""
        try:
            yield
        except RuntimeError as error:
            self.lost.append(f"{what}: {str(error).splitlines()[0]}")
            with suppress(RuntimeError):  # what ails the GPU may stay
                torch.cuda.empty_cache()

    def write(self) -> None:
        content = {
            "machine": self.machine,
            "rows": self.rows,
            "packed": self.packed,
            "lost": self.lost,
            NOT_REACHED: self.missing,
            "dispatch": [fastest(entry) for entry in self.rows],
            "limits": self.limits,
        }
        files = {"cuda.json": json.dumps(content, indent=1) + "\n", "cuda.md": self.markdown()}
        for name, text in files.items():
            new = self.directory / f".{name}"
            new.write_text(text)
            new.replace(self.directory / name)

    def markdown(self) -> str:
        lines = ["# fusedrnn's CUDA kernels and cuDNN", ""]
        lines += [", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        lines += [
            f"One layer, T = {STEPS}, I = H; medians of {MIN_ROUNDS} to {ROUNDS} rounds in turns; "
            "milliseconds a call, and how many times faster than torch.nn. device: the GPU's work "
            "alone; wall: from an idle GPU to an idle GPU. -: the layer is too large for the path. "
            "mixed, torch: where fusedrnn takes a path each for forward and backward, or leaves "
            "the call to torch.nn."
        ]
        for mode in MODES:
            entries = [e for e in self.rows if e["mode"] == mode]
            if entries:
                lines += ["", f"## {mode}", "", COLUMNS]
                lines += [table_line(e, f"{e['batch']}, {e['size']}") for e in entries]
                lines += ["", self.means(entries)]
        if self.packed:
            batch, steps, size = PACKED
            lines += ["", f"## Packed: B = {batch}, H = {size}, lengths even from 1 to {steps}"]
            lines += ["", COLUMNS.replace("B, H", "mode")]
            lines += [table_line(entry, entry["mode"]) for entry in self.packed]
        lines += ["", "## Limits of the GPU", "", *limit_lines(self.limits)]
        failed = failures(self.rows + self.packed)
        found = {"Failed checks": failed, "Lost": self.lost, "Not reached in time": self.missing}
        for name, texts in found.items():
            lines += ["", f"{name}: {len(texts)}.", *(f"- {text}" for text in texts)]
        return "\n".join(lines) + "\n"

    @staticmethod
    def means(entries: Sequence[dict[str, Any]]) -> str:
        found = [fastest(entry)["over torch"] for entry in entries]
        ratios = [value for value in found if value is not None]
        if not ratios:
            return "No path of fusedrnn's was timed."
        slower = sum(value < 1 for value in ratios)
        return (
            f"The best path over torch.nn, device: {geometric_mean(ratios):.2f}x in the geometric "
            f"mean, {min(ratios):.2f}x at least; slower in {slower} of {len(ratios)}."
        )


def grid(report: Report, todo: list[Row], clock: Clock, end: float) -> None:
    """Each row gets its share of the time that is left, and is in the files before the next."""
    problem, made_for = None, None
    for done, row in enumerate(todo):
        left = end - perf_counter()
        report.missing = [f"{r}: {NOT_REACHED}" for r in todo[done:]]
        if left <= 0:
            break
        report.write()
        print(f"{done + 1}/{len(todo)}, {left:.0f} s left: {row}", file=sys.stderr, flush=True)
        what = (row.cell, row.batch, row.size)
        with report.keeps_on(str(row)):
            if made_for != what:
                problem = made_for = None  # its memory first
                problem, made_for = Problem(*what), what
            assert problem is not None
            report.rows.append(measured(problem, row, clock, left / (len(todo) - done)))
    else:
        report.missing = []
    report.write()


def name_kernels(report: Report, end: float) -> None:
    """cuDNN's kernels in training, of as many rows as there is time for. After all that is timed:
    what a profiler has once been at can stay slower."""
    for entry in report.rows:
        if perf_counter() > end:
            break
        if entry["mode"] != MODES[1]:
            continue
        with (
            report.keeps_on(f"{entry['cell']} {entry['number']} kernels' names"),
            kernels(entry["number"] == "tf32"),
        ):
            problem = Problem(entry["cell"], entry["batch"], entry["size"])
            entry["cudnn"] = kernel_names(
                problem.cases(entry["number"])[THEIRS].call(entry["mode"])
            )
    report.write()


def unavailable() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "no CUDA GPU was found"
    return cuda.unavailable(DEVICE)


def measure(report: Report, quick: bool, seconds: int | None = None) -> None:
    """Fills `report`, and writes it on the way, within `seconds`."""
    seconds = seconds or (QUICK_SECONDS if quick else SECONDS)
    end = perf_counter() + seconds
    report.write()
    report.limits = limits() if not quick else "not measured: --quick"
    report.write()
    clock = Clock()
    for cell in common.CELLS:
        for number in NUMBERS if not quick else ("bfloat16",):
            for mode in MODES:
                with report.keeps_on(f"{cell} {number} packed {mode}"):
                    report.packed.append(packed(clock, cell, number, mode))
                report.write()
    grid(report, rows(QUICK_SHAPES if quick else SHAPES), clock, end - NAMES_PART * seconds)
    name_kernels(report, end)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = common.Parser(prog="bench_cuda", description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder; of itself, results/<card>")
    parser.add_argument("--quick", action="store_true", help="few shapes, one minute")
    parser.add_argument("--seconds", type=common.positive_int, help="of all together")
    options = parser.parse_args(arguments)
    reason = unavailable()
    if reason:
        parser.error(reason)
    directory = options.out or directory_of(card())
    directory.mkdir(parents=True, exist_ok=True)
    report = Report(directory, description())
    measure(report, options.quick, options.seconds)
    print(report.markdown())
    return int(bool(failures(report.rows + report.packed) or report.lost))


if __name__ == "__main__":
    sys.exit(main())
