"""The comparison the README quotes: `python -m benchmarks.table`, about five minutes.

torch.nn and fusedrnn take turns in one process, round after round, so that a change of the
machine's speed hits both; every row is printed, losses too. The time of a whole model is not here:
see workloads/.
"""

from __future__ import annotations

import datetime
import itertools
import os
import sys
from collections.abc import Sequence
from statistics import geometric_mean

from . import common


def noise(rounds: int) -> str:
    """torch.nn against itself, timed as the rows are: how far from 1 a speed-up of 1 can look."""
    call = common.make_cases("LSTM", 8, 128)["torch.nn"].call("no_grad")
    with common.threads(1), common.grad_mode("no_grad"):
        timing = common.interleave({"torch.nn": call, "fusedrnn": call}, rounds)
    low, high = timing.quartiles
    return f"torch.nn against itself {timing.speedup():.2f} (quartiles {low:.2f} to {high:.2f})"


def row(cell: str, batch: int, size: int, mode: str, threads: int, timing: common.Timing) -> str:
    low, high = timing.quartiles
    slower = " **slower**" if timing.speedup() < 1 else ""
    return (
        f"| {cell} | {batch} | {size} | {mode} | {threads} | {timing.ms('torch.nn'):.3f} "
        f"| {timing.ms('fusedrnn'):.3f} | {timing.speedup():.2f}{slower} "
        f"| {low:.2f} to {high:.2f} |"
    )


def means(speedups: dict[tuple[str, str, int], list[float]]) -> list[str]:
    lines = ["| cell | mode | threads | geometric mean | lowest |", "|---|---|--:|--:|--:|"]
    for (cell, mode, threads), values in speedups.items():
        mean, lowest = geometric_mean(values), min(values)
        lines.append(f"| {cell} | {mode} | {threads} | {mean:.2f} | {lowest:.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.TableParser("benchmarks.table", __doc__, rounds=15).options(arguments)
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
                calls = {name: case.call(mode) for name, case in cases.items()}
                timing = common.interleave(calls, options.rounds)
        speedups.setdefault((cell, mode, threads), []).append(timing.speedup())
        emit(row(cell, batch, size, mode, threads, timing))
    slower = sum(value < 1 for values in speedups.values() for value in values)
    emit("", *means(speedups), "", f"Rows where fusedrnn is slower: {slower}.")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
