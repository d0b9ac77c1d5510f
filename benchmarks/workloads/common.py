"""What the workloads share: the command line, training of one model with torch.nn and with fusedrnn
in turns, the check that fusedrnn's kernels ran, progress, and what a workload prints and leaves.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn

from .. import common

# torch.nn from weights that are one rounding larger: how far two runs that are alike come apart.
CONTROL = "control"
BACKENDS = {"torch": ["torch.nn"], "fusedrnn": ["fusedrnn"], "both": ["torch.nn", "fusedrnn"]}
BACKENDS["control"] = [*BACKENDS["both"], CONTROL]
COLOURS = {"torch.nn": "tab:gray", "fusedrnn": "tab:red", CONTROL: "tab:blue"}
BLOCK = 10  # steps that one backend runs before it is the other's turn
CHECKPOINTS = 10
LIBRARIES = ("rich", "matplotlib")  # progress and pictures


class Parser(common.Parser):
    """The options of every workload. Those in `full` are whole numbers, smaller with --quick."""

    def __init__(
        self, prog: str, description: str | None, full: dict[str, int], quick: dict[str, int]
    ) -> None:
        super().__init__(prog=prog, description=description)
        self.full, self.quick = full, quick
        self.add_argument("--backend", choices=BACKENDS, default="both")
        self.add_argument("--quick", action="store_true", help="a small run")
        for name, value in full.items():
            text = f"default: {value}, with --quick {quick[name]}"
            self.add_argument(f"--{name}", type=common.positive_int, help=text)
        threads = str(torch.get_num_threads())  # a string: argparse checks the default too
        self.add_argument("--threads", type=common.thread_count, default=threads)
        self.add_argument("--seed", type=int, default=0)
        self.add_argument("--note", default="", help="printed with the machine's description")
        self.add_argument(
            "--out",
            type=Path,
            default=common.REPOSITORY / "benchmarks/results",
            help="a folder for the picture and the text",
        )

    def options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        options = self.parse_args(arguments)
        if not 0 <= options.seed < 2**63 - 2**32:  # torch takes 64 bits, and a step adds its number
            self.error(f"argument --seed: expected a whole number from 0 up, got {options.seed}")
        for name, value in (self.quick if options.quick else self.full).items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        options.sizes = {name: getattr(options, name) for name in self.full}
        self.require(*LIBRARIES)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
        if not os.access(options.out, os.W_OK | os.X_OK):
            self.error(f"argument --out: cannot write into {options.out}")
        torch.set_num_threads(options.threads)
        return options


@dataclass
class Run:
    """One backend's model and what its training has shown so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    state: Any = None  # what the loss function carries from step to step
    losses: list[float] = field(default_factory=list)  # each step
    seconds: list[float] = field(default_factory=list)  # each step
    counts: dict[str, int] = field(default_factory=dict)  # fusedrnn.ops.counts, this run's share


def train(
    backends: Sequence[str],
    model: nn.Module,
    loss: Callable[[Run, int], Tensor],
    *,
    steps: int,
    seed: int,
    calls: int,
    learning_rate: float,
    unit: float = 1.0,
    block: int = BLOCK,
    on_step: Callable[[str, dict[str, Run]], None] = lambda backend, runs: None,
) -> dict[str, Run]:
    """Trains copies of `model`, one a backend of BACKENDS, in turns of `block` steps.

    loss(run, step) is what a step minimises; weights and random numbers are the same in every
    backend. Losses are kept divided by `unit`. Raises RuntimeError unless a step of fusedrnn's is
    `calls` calls of its kernels forward, as many backward, and none by another path.
    """
    runs = {}
    for backend in backends:
        twin = copy.deepcopy(model)
        if backend == "fusedrnn":
            fusedrnn.replace(twin)
        if backend == CONTROL:
            with torch.no_grad():
                for weight in twin.parameters():
                    weight.mul_(1 + torch.finfo(weight.dtype).eps)
        optimizer = torch.optim.Adam(twin.parameters(), lr=learning_rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
        runs[backend] = Run(twin, optimizer, scheduler)
    for first in range(0, steps, block):
        for backend, run in runs.items():
            with counted(run.counts):
                for step in range(first, min(first + block, steps)):
                    torch.manual_seed(seed + step)  # the same data and dropout in every backend
                    train_step(run, loss, step, unit)
                    on_step(backend, runs)
    for backend, run in runs.items():
        check_counts(backend, run.counts, steps * calls)
    return runs


def train_step(run: Run, loss: Callable[[Run, int], Tensor], step: int, unit: float) -> None:
    start = time.perf_counter()
    run.optimizer.zero_grad()
    value = loss(run, step)
    value.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.scheduler.step()
    run.losses.append(value.item() / unit)
    run.seconds.append(time.perf_counter() - start)


@contextmanager
def counted(counts: dict[str, int]) -> Iterator[None]:
    """Adds to `counts` what fusedrnn.ops counts in the meantime."""
    before = dict(fusedrnn.ops.counts)
    yield
    for name, count in fusedrnn.ops.counts.items():
        counts[name] = counts.get(name, 0) + count - before[name]


def check_counts(backend: str, counts: dict[str, int], calls: int) -> None:
    wanted = dict.fromkeys(("kernel_forward", "kernel_backward"), calls)
    if backend != "fusedrnn":
        wanted = {}
    if counts != {name: wanted.get(name, 0) for name in counts}:
        raise RuntimeError(
            f"{backend}: expected {wanted} calls of fusedrnn's kernels and nothing else, "
            f"counted {counts}; `python -m fusedrnn` says what is wrong"
        )


@contextmanager
def progress(total: int, title: str = "training") -> Iterator[Any]:
    """A bar that shows the time left: call advance() on what comes, and print()."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with Progress(*columns) as bars:
        yield Bar(bars, bars.add_task(title, total=total))


@dataclass
class Bar:
    bars: Any
    task: Any

    def step(self, backend: str, runs: dict[str, Run]) -> None:
        """An on_step of train()."""
        self.bars.advance(self.task)

    def title(self, text: str) -> None:
        self.bars.update(self.task, description=text)


class Checkpoints:
    """An on_step of train() that moves a bar and prints the mean losses at every checkpoint."""

    def __init__(self, bar: Bar, output: Output, steps: int, backends: Sequence[str]) -> None:
        marks = sorted({math.ceil(steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})
        self.since = {mark: start for start, mark in itertools.pairwise(marks)}
        self.bar, self.output, self.last = bar, output, backends[-1]

    def __call__(self, backend: str, runs: dict[str, Run]) -> None:
        self.bar.step(backend, runs)
        done = len(runs[backend].losses)
        if backend == self.last and done in self.since:  # the others have been there
            start = self.since[done]
            losses = [fmean(run.losses[start:done]) for run in runs.values()]
            self.output.row(f"steps {start + 1} to {done}", losses)


class Output:
    """Prints lines, also into the text that a workload leaves beside its picture.

    `record` is the same for programs: trainings, with times in milliseconds, and measures of what
    was learned.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.path = options.out / f"{name}.txt"
        self.picture = options.out / f"{name}.png"
        self.quick = options.quick
        self.path.write_text("")
        self.record: dict[str, Any] = {
            "name": name,
            "quick": options.quick,
            "threads": options.threads,
            "trainings": [],
            "measures": [],
        }
        self(f"{common.machine()}, threads: {options.threads}, commit {common.commit()}")
        if options.note:
            self(options.note)

    def __call__(self, text: str = "") -> None:
        print(text)
        with self.path.open("a") as file:
            file.write(text.rstrip() + "\n")

    def row(self, title: str, values: Sequence[str | float]) -> None:
        numbers = [f"{x:.4f}" if isinstance(x, float) and x >= 0.01 else x for x in values]
        cells = [x if isinstance(x, str) else f"{x:.2e}" for x in numbers]
        self(f"{title:>42}" + "".join(f"{cell:>13}" for cell in cells))

    def train(
        self, title: str, backends: Sequence[str], *arguments: Any, **options: Any
    ) -> dict[str, Run]:
        """common.train() under a bar, with a line of losses at every checkpoint."""
        with progress(options["steps"] * len(backends)) as bar:
            self.row(title, backends)
            on_step = Checkpoints(bar, self, options["steps"], backends)
            return train(backends, *arguments, on_step=on_step, **options)

    def times(self, runs: Mapping[str, Run], tokens: int | None = None, noun: str = "") -> None:
        """What a training step took; with `tokens` of them a step, how many a second."""
        milliseconds = {backend: 1e3 * median(run.seconds) for backend, run in runs.items()}
        self.row("ms a step, median", [f"{x:.1f}" for x in milliseconds.values()])
        if tokens:
            rates = [tokens / x for x in milliseconds.values()]
            self.row(f"{noun} a second", [f"{1e3 * x:,.0f}" for x in rates])

    def training(self, runs: Mapping[str, Run], title: str = "") -> None:
        """Keeps the times of a training in the record."""
        self.record["trainings"].append(
            {
                "title": title,
                "step_ms": {name: 1e3 * median(run.seconds) for name, run in runs.items()},
                "seconds": {name: sum(run.seconds) for name, run in runs.items()},
                "speedup": speedup(runs) if both(runs) else None,
            }
        )

    def agreement(self, runs: Mapping[str, Run], title: str = "") -> None:
        """Speed-up, difference of the losses, and the kernels' counters; and keeps the times."""
        self.training(runs, title)
        if both(runs):
            theirs = runs["torch.nn"].losses
            gaps = [abs(a - b) for a, b in zip(theirs, runs["fusedrnn"].losses, strict=True)]
            self(
                f"Speed-up of a training step: {speedup(runs):.2f}x. Largest difference of a "
                f"step's loss: {max(gaps[:100]):.1e} in the first {len(gaps[:100])} steps, "
                f"{max(gaps):.1e} in all (roundings grow as training goes on)."
            )
        if CONTROL in runs:
            last = {
                name: fmean(run.losses[-(len(run.losses) // 5) :]) for name, run in runs.items()
            }
            of_ours, of_control = (
                abs(last[name] / last["torch.nn"] - 1) for name in ("fusedrnn", CONTROL)
            )
            self(
                f"Mean loss of the last fifth: fusedrnn's differs from torch.nn's by "
                f"{of_ours:.1%}; torch.nn's own, from weights one rounding larger, by "
                f"{of_control:.1%}."
            )
        if "fusedrnn" in runs:
            counts = runs["fusedrnn"].counts
            self(
                f"fusedrnn's kernels ran every step: {counts['kernel_forward']} calls forward, "
                f"{counts['kernel_backward']} backward, none by another path."
            )

    def threshold(
        self,
        name: str,
        values: Mapping[str, float],
        at_least: float = -math.inf,
        at_most: float = math.inf,
    ) -> None:
        """Says of every backend's value whether it has learned."""
        missed = "NOT reached" + " (--quick trains less than it takes)" * self.quick
        bound = f"at most {at_most:g}" if at_least == -math.inf else f"at least {at_least:g}"
        reached = {backend: at_least <= value <= at_most for backend, value in values.items()}
        for backend, value in values.items():
            verdict = "reached" if reached[backend] else missed
            self(f"{name}, {backend}: {value:.4f}, threshold {bound}: {verdict}")
        self.measured(name, values, bound, reached)

    def measured(
        self,
        name: str,
        values: Mapping[str, float],
        bound: str | None = None,
        reached: Mapping[str, bool] | None = None,
    ) -> None:
        """Keeps a measure of what every backend has learned in the record; None for NaN."""
        numbers = {b: value if math.isfinite(value) else None for b, value in values.items()}
        measure = {"name": name, "values": numbers, "threshold": bound, "reached": reached}
        self.record["measures"].append(measure)

    def close(self, picture: str = "") -> dict[str, Any]:
        """Says what the picture shows and where it is, and returns the record."""
        if picture:
            print(f"\n{picture}: {self.picture}")
        return self.record


def missed(record: Mapping[str, Any]) -> list[str]:
    """The measures of a whole training that did not reach their thresholds, from a record."""
    if record["quick"]:
        return []
    return [
        f"{measure['name']}, {backend}: threshold {measure['threshold']} not reached"
        for measure in record["measures"]
        for backend, reached in (measure["reached"] or {}).items()
        if not reached
    ]


def exit_code(record: Mapping[str, Any]) -> int:
    """1 if something was `missed`."""
    return int(bool(missed(record)))


def both(runs: Mapping[str, Run]) -> bool:
    return {"torch.nn", "fusedrnn"} <= runs.keys()


def speedup(runs: Mapping[str, Run]) -> float:
    """How many times faster fusedrnn's median step is."""
    return median(runs["torch.nn"].seconds) / median(runs["fusedrnn"].seconds)


@contextmanager
def figure(path: Path, *shape: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """matplotlib's figure and axes (rows, columns), saved to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
    yield figure, axes
    figure.savefig(path, dpi=100)
    plt.close(figure)


def moving_mean(values: Sequence[float]) -> list[float]:
    window = max(1, len(values) // 50)
    return [fmean(values[max(0, i - window) : i]) for i in range(1, len(values) + 1)]
