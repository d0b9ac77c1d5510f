"""What the benchmarks share: the machine's description, a torch.nn module and its fusedrnn twin as
calls to time, and the check that a twin is right and ran on the kernels. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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


class Parser(argparse.ArgumentParser):
    """argparse, with a bad value told in one line (exit code 2) instead of under the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def cores() -> int:
    """The cores this process may use, which a container can make fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


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
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensors(result: Tensor | tuple) -> list[Tensor]:
    """The tensors of a module's result, in order: output, h_n, c_n."""
    return [result] if isinstance(result, Tensor) else [t for r in result for t in tensors(r)]


class Case:
    """A module, its input and states, and the gradients that reach its first two results.

    Those are output and h_n for a sequence, h and c for an LSTMCell. They are dense, as another
    layer's would be, and input and states need gradients too, as they do inside a model.
    """

    def __init__(self, module: nn.Module, input: Tensor, states: Sequence[Tensor]) -> None:
        self.module = module
        self.input, *self.states = [t.clone().requires_grad_() for t in (input, *states)]
        self.hx = tuple(self.states) if len(self.states) == 2 else next(iter(self.states), None)
        self.leaves = [self.input, *self.states, *module.parameters()]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            results = self.forward()[:2]
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


def make_cases(cell: str, batch: int, size: int) -> dict[str, Case]:
    """`cell` is a class name of torch.nn: LSTM, ..., RNNCell. The same in both modules.

    A sequence starts from no state, as most do; a cell is given one, as in the middle of a loop.
    """
    torch.manual_seed(0)
    if cell.endswith("Cell"):
        input, *states = torch.randn(3 if cell == "LSTMCell" else 2, batch, size)
    else:
        input, states = torch.randn(STEPS, batch, size), []
    modules = {name: getattr(source, cell)(size, size) for name, source in IMPLEMENTATIONS.items()}
    modules["fusedrnn"].load_state_dict(modules["torch.nn"].state_dict())
    return {name: Case(module, input, states) for name, module in modules.items()}


def check(cases: dict[str, Case], mode: str) -> None:
    """Raises RuntimeError unless fusedrnn's kernels ran and are about as exact as torch.nn.

    Every result and gradient is compared with torch.nn in float64, relative to its largest value:
    the error may be twice that of torch.nn in float32, and a rounding more (torch.nn may be exact).
    """
    theirs = cases["torch.nn"]
    inputs = [t.detach().double() for t in (theirs.input, *theirs.states)]
    exact = Case(copy.deepcopy(theirs.module).double(), inputs[0], inputs[1:])
    exact.grads = [grad.double() for grad in theirs.grads]
    expected = exact.values(mode)
    before = dict(fusedrnn.ops.counts)
    values = cases["fusedrnn"].values(mode)
    ran = {name: count - before[name] for name, count in fusedrnn.ops.counts.items()}
    wanted = {"kernel_forward": 1, "kernel_backward": int(mode != "no_grad")}
    if ran != {name: wanted.get(name, 0) for name in ran}:
        raise RuntimeError(f"expected one call of fusedrnn's kernels ({wanted}), counted {ran}")
    rounding = torch.finfo(torch.float32).eps
    for i, (ours, torchs, right) in enumerate(
        zip(values, theirs.values(mode), expected, strict=True)
    ):
        scale = right.abs().max()
        error, limit = ((t - right).abs().max().item() / scale for t in (ours, torchs))
        if not error <= 2 * limit + rounding:
            raise RuntimeError(
                f"{type(theirs.module).__name__}, input {tuple(theirs.input.shape)}, {mode}: "
                f"tensor {i} of results and gradients is off by {error:.1e} where torch.nn is by "
                f"{limit:.1e}"
            )


def run_benchmark(
    benchmark: Any, cell: str, batch: int, size: int, count: int, mode: str, implementation: str
) -> None:
    """One case of bench_*.py under pytest-benchmark's fixture, checked before it is timed."""
    import pytest  # only here: table.py and the workloads do without

    if count > cores():
        pytest.skip(f"{count} threads need {count} cores, this process has {cores()}")
    benchmark.group = f"{cell} B={batch} H={size}, {mode}, threads: {count}"
    cases = make_cases(cell, batch, size)
    with threads(count):
        check(cases, mode)
        with grad_mode(mode):
            benchmark(cases[implementation].call(mode))
