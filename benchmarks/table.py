"""The comparison the README quotes: `python -m benchmarks.table`, about five minutes.

torch.nn and fusedrnn take turns in one process, round after round, so that a change of the
machine's speed hits both; every row is printed, losses too. The time of a whole model is not here:
see workloads/.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from time import perf_counter_ns

from . import common

ROUND_NS = 40_000_000  # one side of a round: thousands of clock ticks, yet many rounds in a minute
CELLS = ("LSTM", "GRU", "RNN")


@dataclass
class Timing:
    """Milliseconds a call, and how many times faster than the first the second is, each round."""

    first: float
    second: float
    speedups: list[float]

    @property
    def speedup(self) -> float:
        return self.first / self.second

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = quantiles(self.speedups, method="inclusive")
        return low, high


def interleave(first: Callable, second: Callable, rounds: int) -> Timing:
    """Medians over rounds in which both run, one after the other, as often as fills ROUND_NS."""

    def time(call: Callable, times: int) -> float:
        start = perf_counter_ns()
        for _ in range(times):
            call()
        return (perf_counter_ns() - start) / times

    calls = (first, second)
    for call in calls:
        time(call, 3)  # the first calls pay for allocations and torch's own caches
    times = [max(1, math.ceil(ROUND_NS / time(call, 1))) for call in calls]
    gc.collect()
    gc.disable()
    try:
        pairs = [
            [time(*side) / 1e6 for side in zip(calls, times, strict=True)] for _ in range(rounds)
        ]
    finally:
        gc.enable()
    firsts, seconds = zip(*pairs, strict=True)
    return Timing(median(firsts), median(seconds), [a / b for a, b in pairs])


def noise(rounds: int) -> str:
    """torch.nn against itself, timed as the rows are: how far from 1 a speed-up of 1 can look."""
    call = common.make_cases("LSTM", 8, 128)["torch.nn"].call("no_grad")
    with common.threads(1), common.grad_mode("no_grad"):
        timing = interleave(call, call, rounds)
    low, high = timing.quartiles
    return f"torch.nn against itself {timing.speedup:.2f} (quartiles {low:.2f} to {high:.2f})"


def row(cell: str, batch: int, size: int, mode: str, threads: int, timing: Timing) -> str:
    low, high = timing.quartiles
    slower = " **slower**" if timing.speedup < 1 else ""
    return (
        f"| {cell} | {batch} | {size} | {mode} | {threads} | {timing.first:.3f} "
        f"| {timing.second:.3f} | {timing.speedup:.2f}{slower} | {low:.2f} to {high:.2f} |"
    )


def means(speedups: dict[tuple[str, str, int], list[float]]) -> list[str]:
    lines = ["| cell | mode | threads | geometric mean | lowest |", "|---|---|--:|--:|--:|"]
    for (cell, mode, threads), values in speedups.items():
        mean, lowest = geometric_mean(values), min(values)
        lines.append(f"| {cell} | {mode} | {threads} | {mean:.2f} | {lowest:.2f} |")
    return lines


def parse(arguments: Sequence[str] | None):
    def threads_list(text: str) -> list[int]:
        counts = [common.positive_int(item) for item in text.split(",")]
        if max(counts) > common.cores():
            raise argparse.ArgumentTypeError(
                f"expected at most {common.cores()} threads, the cores of this process, got {text}"
            )
        return counts

    def cell_list(text: str) -> list[str]:
        cells = text.split(",")
        if not set(cells) <= set(CELLS):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(CELLS)}, got {text!r}")
        return cells

    parser = common.Parser(prog="benchmarks.table", description=__doc__)
    parser.add_argument("--out", type=Path, help="a markdown file to write, with what is printed")
    parser.add_argument("--threads", type=threads_list, default=[1, 2][: common.cores()])
    parser.add_argument("--rounds", type=common.positive_int, default=15)
    parser.add_argument("--cells", type=cell_list, default=list(CELLS))
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        parser.error(
            f"argument --rounds: expected at least 3 to show a spread, got {options.rounds}"
        )
    if options.out:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.touch()  # a bad path is told now, not after five minutes
        except OSError as error:
            parser.error(f"argument --out: cannot write {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    lines: list[str] = []

    def emit(*new: str) -> None:
        lines.extend(new)
        print(*new, sep="\n", flush=True)

    emit(
        "# fusedrnn against torch.nn on the CPU",
        "",
        f"- {common.machine()}",
        f"- {datetime.date.today()}, commit {common.commit()}, Python {sys.version.split()[0]}, "
        f"load average at the start {os.getloadavg()[0]:.2f}",
        f"- noise: {noise(options.rounds)}",
        f"- float32, one layer, input size = hidden size = H, {common.STEPS} steps, batch B; "
        f"medians of {options.rounds} rounds in which the two take turns",
        "- forward+backward: dense gradients of output and h_n, down to every weight and the input",
        "- before its timing, each row's results and gradients were checked against float64",
        "",
        "| cell | B | H | mode | threads | torch.nn ms | fusedrnn ms | speed-up | quartiles |",
        "|---|--:|--:|---|--:|--:|--:|--:|---|",
    )
    speedups: dict[tuple[str, str, int], list[float]] = {}
    rows = itertools.product(options.cells, common.MODES, options.threads, common.SHAPES)
    for cell, mode, threads, (batch, size) in rows:
        cases = common.make_cases(cell, batch, size)
        with common.threads(threads):
            common.check(cases, mode)
            with common.grad_mode(mode):
                timing = interleave(*(case.call(mode) for case in cases.values()), options.rounds)
        speedups.setdefault((cell, mode, threads), []).append(timing.speedup)
        emit(row(cell, batch, size, mode, threads, timing))
    slower = sum(value < 1 for values in speedups.values() for value in values)
    emit("", *means(speedups), "", f"Rows where fusedrnn is slower: {slower}.")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
