"""Sequences of several lengths, boundaries within them, and gates that backward computes again:
fusedrnn's calls against torch.nn's PackedSequence, in turns: `python -m benchmarks.bench_lengths`.
float32, one layer, B = 32, T = 100, H = 128, lengths drawn evenly from 1 to 100; reset_mask is true
at every twentieth step or so.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from .common import IMPLEMENTATIONS, TableParser, commit, interleave, machine, publish, threads

BATCH, STEPS, SIZE = 32, 100, 128
SECONDS = 30  # a line of the table, at most


def implementations(cell: str, training: bool) -> dict[str, Callable[[], Any]]:
    """The calls; each returns the output's sum, after backward if `training`."""
    torch.manual_seed(0)
    theirs, ours = (getattr(IMPLEMENTATIONS[n], cell)(SIZE, SIZE) for n in ("torch.nn", "fusedrnn"))
    ours.load_state_dict(theirs.state_dict())
    recomputing = copy.deepcopy(ours)
    recomputing.recompute_gates = True
    lengths = torch.randint(1, STEPS + 1, (BATCH,))
    lengths[0] = STEPS
    padded = torch.randn(STEPS, BATCH, SIZE)
    packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
    mask = torch.rand(STEPS, BATCH) < 0.05

    def call(module: Any, input: Any, **keywords: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.set_grad_enabled(training):
                output = module(input, **keywords)[0]
                total = (output.data if isinstance(output, PackedSequence) else output).sum()
            if training:
                total.backward()
            return total.detach()

        return run

    return {
        "fusedrnn": call(ours, packed),  # what `speedup` divides by
        "torch.nn, packed": call(theirs, packed),
        "padded": call(ours, padded),
        "lengths": call(ours, padded, lengths=lengths),
        "reset_mask": call(ours, padded, reset_mask=mask),
        "recompute_gates": call(recomputing, padded),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = TableParser("python -m benchmarks.bench_lengths", __doc__, rounds=15)
    options = parser.options(arguments)
    lines = [
        f"{machine()}, commit {commit()}",
        "",
        "ms, and times the packed call of fusedrnn; reset_mask and recompute_gates: times the "
        "padded call",
        "",
        "| | threads | packed | torch.nn, packed | padded | lengths | padded, reset_mask | padded, "
        "recompute_gates |",
        "|---" * 8 + "|",
    ]
    for cell in options.cells:
        for training in (False, True):
            calls = implementations(cell, training)
            expected = calls["torch.nn, packed"]()
            for name in ("fusedrnn", "lengths"):
                torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-2)
            for count in options.threads:
                with threads(count):
                    timing = interleave(calls, options.rounds, SECONDS)
                times = [f"{timing.ms('fusedrnn'):.2f}"]
                times += [
                    f"{timing.ms(name):.2f} ({timing.speedup(name):.2f}x)"
                    for name in ("torch.nn, packed", "padded", "lengths")
                ]
                times += [
                    f"{timing.ms(name):.2f} ({timing.ms(name) / timing.ms('padded'):.3f}x)"
                    for name in ("reset_mask", "recompute_gates")
                ]
                what = f"{cell}, {'training' if training else 'inference'}"
                lines.append(f"| {what} | {count} | {' | '.join(times)} |")
                print(lines[-1], file=sys.stderr)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
