"""What the benchmarks share: the machine's description, a torch.nn module and its fusedrnn twin as
calls to time, the check that a twin is right and ran on the kernels, and timing in turns.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns, sleep
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import fusedrnn

REPOSITORY = Path(__file__).resolve().parent.parent
IMPLEMENTATIONS = {"torch.nn": nn, "fusedrnn": fusedrnn}
MODES = ("no_grad", "forward+backward")
STEPS = 100
SHAPES = ((1, 32), (1, 128), (8, 128), (32, 256), (64, 512))  # (batch, input and hidden size)
CELL_SHAPES = ((1, 128), (32, 256))
CELLS = ("LSTM", "GRU", "RNN")
ROUND_NS = 40_000_000  # one side of a round: thousands of clock ticks, yet many rounds in a minute
SETTLE_SECONDS = 0.01  # idle threads of the side before stop spinning, and leave their core
MIN_ROUNDS = 3  # fewer show no spread
PROBE_SIZE = 256  # of has_cores' matrices: 0.2 ms on two threads
CROWDED = 1.5  # times as long as at best; two threads on one core take 2, a noisy machine 1.2
WAIT_SECONDS = 0.1
PATIENCE_SECONDS = 3.0  # to wait for cores, in all rounds together
FLOAT64_ROUNDINGS = 32  # how far two float64 implementations may be apart; 9 were seen
# Of data, by torch.nn's errors on which fusedrnn's is judged. By one, 1 of 30 fails in the biases'
# gradients of an RNN's 32 units, which are as exact on average (2.1e-7; torch.nn: 2.0e-7, 2.7e-7).
DRAWS = 3


class Parser(argparse.ArgumentParser):
    """argparse, with a bad value told in one line (exit code 2) instead of under the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def require(self, *libraries: str) -> None:
        missing = [name for name in libraries if importlib.util.find_spec(name) is None]
        if missing:
            self.error(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")

    def check_writable(self, path: Path) -> None:
        """A path that cannot be written is told now, not after minutes. Leaves nothing behind."""
        try:
            if path.exists() and not path.is_file():
                raise OSError(None, "not a file")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary(path).touch()
            temporary(path).unlink()
        except OSError as error:
            self.error(f"argument --out: cannot write {path}: {error.strerror}")

    def check_rounds(self, rounds: int | None) -> None:
        if rounds is not None and rounds < MIN_ROUNDS:
            self.error(
                f"argument --rounds: expected at least {MIN_ROUNDS} to show a spread, got {rounds}"
            )


def temporary(path: Path) -> Path:
    """Beside `path`, so that it can be renamed to it."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, text: str) -> None:
    """All of `text` or, if that fails, what was in the file before."""
    temporary(path).write_text(text)
    temporary(path).replace(path)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def thread_list(text: str) -> list[int]:
    counts = [positive_int(item) for item in text.split(",")]
    if max(counts) > cores():
        raise argparse.ArgumentTypeError(
            f"expected at most {cores()} threads, the cores of this process, got {text}"
        )
    return counts


def thread_count(text: str) -> int:
    """As thread_list, of one number."""
    positive_int(text)
    return thread_list(text)[0]


def list_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        items = text.split(",")
        if not set(items) <= set(choices):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(choices)}, got {text!r}")
        return items

    return parse


class TableParser(Parser):
    """The options of a program that prints a table: --out, --threads, --rounds and --cells."""

    def __init__(self, prog: str, description: str | None, rounds: int | None) -> None:
        super().__init__(prog=prog, description=description)
        self.add_argument("--out", type=Path, help="a markdown file to write, with what is printed")
        self.add_argument("--threads", type=thread_list, default=[1, 2][: cores()])
        self.add_argument("--rounds", type=positive_int, default=rounds)
        self.add_argument("--cells", type=list_of(CELLS), default=list(CELLS))

    def options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        options = self.parse_args(arguments)
        self.check_rounds(options.rounds)
        if options.out:
            self.check_writable(options.out)
        return options


def publish(lines: Sequence[str], out: Path | None) -> None:
    """Prints a table's lines, and writes them to the file `out` if there is one."""
    text = "\n".join(lines)
    print(text)
    if out:
        out.write_text(text + "\n")


def cores() -> int:
    """The cores this process may use, which a container can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The name, with family and model where Linux tells them: a virtual machine's says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        text = ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def machine() -> str:
    return (
        f"{cpu_model()}, {cores()} cores, torch {torch.__version__}, fusedrnn kernels for "
        f"{fusedrnn.isa()}"
    )


def commit() -> str:
    """The checkout's commit, marked if sources differ from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads(count), inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What there is already is no garbage: inside, a collection looks through the rest alone (all
    that torch imports takes it 0.3 s, and there is one before each measurement)."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tensors(result: Tensor | tuple) -> list[Tensor]:
    """The tensors of a module's result, in order: output, h_n, c_n."""
    return [result] if isinstance(result, Tensor) else [t for r in result for t in tensors(r)]


class Case:
    """A module, its input and states, and the gradients that reach its first two results.

    Those are output and h_n for a sequence, h and c for an LSTMCell. They are dense, as another
    layer's would be, and input and states need gradients too, as they do inside a model. Not
    `inner`, the input is data: only output has a gradient, and only the weights need theirs.
    """

    def __init__(
        self, module: nn.Module, input: Tensor, states: Sequence[Tensor], inner: bool = True
    ) -> None:
        self.module, self.inner = module, inner
        self.input, *self.states = [t.clone().requires_grad_(inner) for t in (input, *states)]
        self.hx = tuple(self.states) if len(self.states) == 2 else next(iter(self.states), None)
        self.leaves = [t for t in (self.input, *self.states) if inner] + list(module.parameters())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            results = self.forward()[: 2 if inner else 1]
        self.grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in results]

    def forward(self) -> list[Tensor]:
        return tensors(self.module(self.input, self.hx))

    def forward_backward(self) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.grad = None
        results = self.forward()
        torch.autograd.backward(results[: len(self.grads)], self.grads)
        return results

    def call(self, mode: str) -> Callable[[], list[Tensor]]:
        """What to time, under `with grad_mode(mode)`."""
        return self.forward if mode == "no_grad" else self.forward_backward

    def values(self, mode: str) -> list[Tensor]:
        """Everything that a call computes: the results and, if it goes backward, the gradients."""
        with grad_mode(mode):
            results = [t.detach().clone() for t in self.call(mode)()]
        return results + [t.grad.clone() for t in self.leaves if mode != "no_grad"]


def grad_mode(mode: str) -> torch.set_grad_enabled:
    return torch.set_grad_enabled(mode != "no_grad")


def make_cases(
    cell: str,
    batch: int,
    size: int,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float32,
    inner: bool = True,
    seed: int = 0,
) -> dict[str, Case]:
    """`cell` is a class name of torch.nn: LSTM, ..., RNNCell. The same in both modules.

    A sequence starts from no state, as most do; a cell is given one, as in the middle of a loop.
    """
    torch.manual_seed(seed)
    if cell.endswith("Cell"):
        input, *states = torch.randn(3 if cell == "LSTMCell" else 2, batch, size)
    else:
        input, states = torch.randn(steps, batch, size), []
    modules = {name: getattr(source, cell)(size, size) for name, source in IMPLEMENTATIONS.items()}
    modules["fusedrnn"].load_state_dict(modules["torch.nn"].state_dict())
    input, states = input.to(dtype), [state.to(dtype) for state in states]
    return {name: Case(module.to(dtype), input, states, inner) for name, module in modules.items()}


def exact(case: Case, mode: str) -> list[Tensor]:
    """What a case of torch.nn computes, computed in float64: Case.values."""
    inputs = [t.detach().double() for t in (case.input, *case.states)]
    double = Case(copy.deepcopy(case.module).double(), inputs[0], inputs[1:], case.inner)
    double.grads = [grad.double() for grad in case.grads]
    return double.values(mode)


def errors(case: Case, mode: str, expected: Sequence[Tensor]) -> list[float]:
    """The largest of each result and gradient that `exact` found, relative to its largest value."""
    pairs = zip(case.values(mode), expected, strict=False)
    return [((t - right).abs().max() / right.abs().max()).item() for t, right in pairs]


def check_values(
    cases: dict[str, Case],
    mode: str,
    expected: Sequence[Tensor],
    draw: Callable[[int], dict[str, Case]] | None = None,
) -> None:
    """Raises RuntimeError unless fusedrnn is about as exact as torch.nn.

    The error of every result and gradient may be twice that of torch.nn in the same dtype, and a
    rounding more (torch.nn may be exact). In float64 torch.nn is what it is compared with, and its
    roundings do not show. The error of a few numbers is much a matter of luck: where torch.nn seems
    to have had some, draw(seed) makes cases like these of other data, and its largest error counts.
    """
    theirs = cases["torch.nn"]
    dtype = theirs.input.dtype
    floor = torch.finfo(dtype).eps * (FLOAT64_ROUNDINGS if dtype == torch.float64 else 1)
    found, limits = (errors(cases[name], mode, expected) for name in ("fusedrnn", "torch.nn"))
    for seed in range(1, DRAWS + 1):
        judged = list(zip(found, limits, strict=True))
        wrong = [i for i, (error, limit) in enumerate(judged) if not error <= 2 * limit + floor]
        if not wrong:
            return
        if draw is None or seed == DRAWS:
            break
        case = draw(seed)["torch.nn"]
        limits = list(map(max, limits, errors(case, mode, exact(case, mode))))
    i = wrong[0]
    raise RuntimeError(
        f"{type(theirs.module).__name__}, {dtype}, input {tuple(theirs.input.shape)}, "
        f"{mode}: tensor {i} of results and gradients is off by {found[i]:.1e} where "
        f"torch.nn is by {limits[i]:.1e}"
    )


def check(cases: dict[str, Case], mode: str) -> None:
    """Raises RuntimeError unless `check_values` holds and fusedrnn's kernels ran."""
    expected = exact(cases["torch.nn"], mode)
    before = dict(fusedrnn.ops.counts)
    check_values(cases, mode, expected)
    ran = {name: count - before[name] for name, count in fusedrnn.ops.counts.items()}
    wanted = {"kernel_forward": 1, "kernel_backward": int(mode != "no_grad")}
    if ran != {name: wanted.get(name, 0) for name in ran}:
        raise RuntimeError(f"expected one call of fusedrnn's kernels ({wanted}), counted {ran}")


@dataclass
class Timing:
    """Milliseconds a call, round by round, for each of those that took turns."""

    rounds: dict[str, list[float]]
    crowded: int = 0  # rounds in which the threads had not got a core each

    def ms(self, name: str) -> float:
        return median(self.rounds[name])

    def speedup(self, over: str = "torch.nn") -> float:
        return self.ms(over) / self.ms("fusedrnn")

    def quartiles(self, over: str = "torch.nn") -> tuple[float, float]:
        """Of the speed-up, taken in each round."""
        pairs = zip(self.rounds[over], self.rounds["fusedrnn"], strict=True)
        low, _, high = quantiles([a / b for a, b in pairs], method="inclusive")
        return low, high


def time(call: Callable, times: int) -> float:
    """Nanoseconds a call."""
    start = perf_counter_ns()
    for _ in range(times):
        call()
    return (perf_counter_ns() - start) / times


fastest_probe: dict[int, float] = {}  # nanoseconds, by threads


def has_cores() -> bool:
    """Whether the threads have a core each now, as far as a product of matrices tells.

    The host of a virtual machine may run two of its CPUs on one core, for seconds or minutes: then
    two threads take twice their time.
    """
    count = torch.get_num_threads()
    if count == 1:
        return True
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE)
    now = min(time(lambda: torch.mm(matrix, matrix), 1) for _ in range(5))
    fastest_probe[count] = min(now, fastest_probe.get(count, now))
    return now < CROWDED * fastest_probe[count]


def interleave(calls: dict[str, Callable], rounds: int, seconds: float = math.inf) -> Timing:
    """Times rounds in which all run, one after the other, each as often as fills ROUND_NS.

    Every second round goes backwards: else one would always follow the other, whose threads may
    still spin. A round waits until the threads have a core each, if that does not take too long;
    rounds that run without are counted. No round starts after `seconds`, but for MIN_ROUNDS of
    them.
    """

    def repeats(call: Callable) -> int:
        if time(call, 1) > ROUND_NS:
            return 1
        time(call, 2)  # the first calls pay for allocations and torch's own caches
        return max(1, math.ceil(ROUND_NS / time(call, 1)))

    times = {name: repeats(call) for name, call in calls.items()}
    timing = Timing({name: [] for name in calls})
    patience = PATIENCE_SECONDS
    gc.collect()
    gc.disable()
    start = perf_counter_ns()
    try:
        for done in range(rounds):
            if done >= MIN_ROUNDS and perf_counter_ns() - start > seconds * 1e9:
                break
            while not (ready := has_cores()) and patience > 0:
                sleep(WAIT_SECONDS)
                patience -= WAIT_SECONDS
            timing.crowded += not ready
            for name in list(calls)[:: -1 if done % 2 else 1]:
                sleep(SETTLE_SECONDS)
                timing.rounds[name].append(time(calls[name], times[name]) / 1e6)
    finally:
        gc.enable()
    return timing


def run_benchmark(
    benchmark: Any, cell: str, batch: int, size: int, count: int, mode: str, implementation: str
) -> None:
    """One case of bench_*.py under pytest-benchmark's fixture, checked before it is timed."""
    import pytest  # only here: the suites and the workloads do without

    if count > cores():
        pytest.skip(f"{count} threads need {count} cores, this process has {cores()}")
    benchmark.group = f"{cell} B={batch} H={size}, {mode}, threads: {count}"
    cases = make_cases(cell, batch, size)
    with threads(count):
        check(cases, mode)
        with grad_mode(mode):
            benchmark(cases[implementation].call(mode))
