"""Prefix sums modulo n: what an RNN learns from short sequences, from long ones, and when it is
told its own past. Input: T numbers of 0..n-1; target at every step: the sum so far modulo n.

Two models: an LSTM with a linear decoder, and a two-layer network on (previous sum, value) that is
a recurrent network only in that its output, as probabilities, is its next input (Jordan, 1986).
Three ways to train each, at lengths 20, 200 and 500: plain BPTT; truncated BPTT, in chunks whose
state is carried on but not its gradient; and teacher forcing (Williams and Zipser, 1989), where the
previous sum that the model is given is the true one. All are tested at length 5,000 on their own
outputs.

The table says which findings of the textbooks come out: perfect generalisation from length 20,
failure from length 200 alone, repair by teacher forcing. Whether an LSTM that knows length 20 is
right in all of a far longer sequence depends on the seed, so that case is trained with several. The
two-layer network has no module that fusedrnn replaces, so it is trained once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import common
from .common import Run

PLAIN, TRUNCATED, FORCED = "plain BPTT", "truncated BPTT", "teacher forcing"
CHUNK = 20  # of truncated BPTT
# The share of --steps that a length gets: a long sequence costs more and has more to learn from.
SHARES = {20: 1.0, 200: 0.25, 500: 0.1}
FULL = {"steps": 4000, "hidden": 64, "batch": 32, "n": 10, "test": 5000, "seeds": 5}
QUICK = {"steps": 1500, "hidden": 64, "batch": 32, "n": 10, "test": 1000, "seeds": 2}
LEARNED, FAILED = 0.95, 0.5  # accuracies
SEEDED = ("LSTM", PLAIN, 20)  # is trained with several seeds


class LSTMDecoder(nn.Module):
    """Reads the values, and with teacher forcing the previous sums too."""

    def __init__(self, n: int, hidden: int, forced: bool) -> None:
        super().__init__()
        self.n, self.forced = n, forced
        self.lstm = nn.LSTM(2 * n if forced else n, hidden)
        self.decoder = nn.Linear(hidden, n)

    def forward(self, values: Tensor, previous: Tensor | None, state: tuple | None = None) -> tuple:
        """values, previous [T, B] -> logits [T, B, n], state."""
        input = F.one_hot(values, self.n).float()
        if previous is not None:
            input = torch.cat([input, F.one_hot(previous, self.n)], -1)
        output, state = self.lstm(input, state)
        return self.decoder(output), state

    def free(self, values: Tensor) -> Tensor:
        """values [T, B] -> sums [T, B], each computed from the model's own."""
        if not self.forced:
            return self(values, None)[0].argmax(-1)
        state, sums = None, [torch.zeros_like(values[0])]
        for value in values:
            logits, state = self(value[None], sums[-1][None], state)
            sums.append(logits[0].argmax(-1))
        return torch.stack(sums[1:])


class TwoLayers(nn.Module):
    """A feed-forward network on (previous sum, value) -> sum; the loop is around it."""

    def __init__(self, n: int, hidden: int, forced: bool) -> None:
        super().__init__()
        self.n = n
        self.layers = nn.Sequential(nn.Linear(2 * n, hidden), nn.ReLU(), nn.Linear(hidden, n))

    def forward(self, values: Tensor, previous: Tensor | None, state: tuple | None = None) -> tuple:
        input = F.one_hot(values, self.n).float()
        if previous is not None:  # told the past, it has no recurrence: one call for all steps
            return self.layers(torch.cat([input, F.one_hot(previous, self.n)], -1)), None
        first = F.one_hot(torch.zeros_like(values[0]), self.n).float()
        sums, logits = (first if state is None else state[0]), []
        for value in input:
            logits.append(self.layers(torch.cat([value, sums], -1)))
            sums = logits[-1].softmax(-1)
        return torch.stack(logits), (sums,)

    def free(self, values: Tensor) -> Tensor:
        sums = [torch.zeros_like(values[0])]
        for value in values:
            sums.append(self(value[None], sums[-1][None])[0][0].argmax(-1))
        return torch.stack(sums[1:])


MODELS = {"LSTM": LSTMDecoder, "two layers": TwoLayers}


@dataclass
class Trained:
    """One row of the table."""

    model: str
    method: str
    length: int
    seed: int
    runs: dict[str, Run]
    correct: dict[str, Tensor]  # backend -> [test] the share of right sums at each position

    def accuracy(self, backend: str, first: int | None = None) -> float:
        """Over the first positions, or all."""
        return self.correct[backend][:first].mean().item()


def shown(accuracy: float) -> str:
    """Rounded down, so that 1.0000 is every one."""
    return f"{math.floor(1e4 * accuracy) / 1e4:.4f}"


def draw_sequences(n: int, length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """values, sums, and the sums one step earlier, all [length, batch]."""
    values = torch.randint(n, (length, batch))
    sums = values.cumsum(0) % n
    return values, sums, F.pad(sums, (0, 0, 1, 0))[:-1]


def train(
    backends: Sequence[str],
    model: str,
    method: str,
    length: int,
    *,
    steps: int,
    hidden: int,
    batch: int,
    n: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    """`steps` updates of one model; in truncated BPTT every chunk is an update."""
    torch.manual_seed(seed)
    forced = method == FORCED
    chunk = CHUNK if method == TRUNCATED else length

    def loss(run: Run, step: int) -> Tensor:
        start = step * chunk % length
        if start == 0:
            run.state = (None, *draw_sequences(n, length, batch))
        state, *data = run.state
        values, sums, previous = (tensor[start : start + chunk] for tensor in data)
        logits, state = run.model(values, previous if forced else None, state)
        run.state = (state and tuple(tensor.detach() for tensor in state), *data)
        return F.cross_entropy(logits.flatten(0, 1), sums.flatten())

    return trainer(
        backends,
        MODELS[model](n, hidden, forced),
        loss,
        steps=steps,
        seed=seed,
        calls=int(model == "LSTM"),
        learning_rate=6e-3 if model == "LSTM" else 1e-2,
    )


@torch.no_grad()
def evaluate(model: nn.Module, n: int, length: int, seed: int, batch: int = 32) -> Tensor:
    """[length] the share of sequences whose sum is right there, on the model's own outputs."""
    torch.manual_seed(seed + 2**31)  # sequences that training has not drawn
    values, sums, _ = draw_sequences(n, length, batch)
    return (model.free(values) == sums).float().mean(1)


def findings(rows: Sequence[Trained]) -> list[tuple[str, str]]:
    """What textbooks say, and what these runs say to it: in part if some do and some do not."""

    def failed(accuracy: float) -> bool:
        return accuracy < FAILED

    long = sorted({row.length for row in rows if row.length > CHUNK})
    claims: list[tuple[str, str, list[int], Callable[[float], bool]]] = [
        ("length 20 generalises perfectly", PLAIN, [20], lambda x: x == 1),
        *((f"length {length} alone fails", PLAIN, [length], failed) for length in long),
        ("truncated BPTT fails too", TRUNCATED, long, failed),
        ("teacher forcing repairs it", FORCED, long, lambda x: x > 0.999),
    ]
    found = []
    for model in MODELS:
        for claim, method, lengths, holds in claims:
            held, seen = [], []
            for length in lengths:
                same = [x for x in rows if (x.model, x.method, x.length) == (model, method, length)]
                told = []
                for backend in same[0].correct:
                    accuracies = [row.accuracy(backend) for row in same]
                    holding = [holds(x) for x in accuracies]
                    answer = "yes" if all(holding) else "no"
                    if len(same) > 1:
                        answer = f"{sum(holding)} of {len(same)} seeds"
                    told.append(f"{backend} {answer} ({shown(min(accuracies))})")
                    held += holding
                seen.append(f"at {length}: {', '.join(told)}")
            verdict = "reproduced" if all(held) else "in part" if any(held) else "NOT reproduced"
            found.append((f"{model}: {claim}", f"{verdict}; {'; '.join(seen)}"))
    return found


def draw(rows: Sequence[Trained], path: Path) -> None:
    """Accuracy against position, for each model and each way to train it."""
    colours = {PLAIN: "tab:red", TRUNCATED: "tab:orange", FORCED: "tab:blue"}
    widths = {PLAIN: 2, TRUNCATED: 2, FORCED: 6}  # wide where others lie upon it
    styles = dict(zip(SHARES, ("-", "--", ":"), strict=True))
    with common.figure(path, 1, 2, size=(10, 4.2)) as (figure, panels):
        for axes, model in zip(panels, MODELS, strict=True):
            for row in (row for row in rows if row.model == model):
                correct = list(row.correct.values())[-1]
                # In 40 spans that are of equal width on the axis.
                edges = torch.logspace(0, torch.tensor(len(correct)).log10(), 41).long().unique()
                spans = [correct[a - 1 : b - 1].mean() for a, b in pairwise(edges)]
                label = f"{row.method}, length {row.length}" if row.seed == rows[0].seed else None
                style = {"color": colours[row.method], "linestyle": styles[row.length]}
                style |= {"linewidth": widths[row.method], "alpha": 2 / widths[row.method]}
                axes.plot(edges[:-1], spans, label=label, zorder=8 - style["linewidth"], **style)
            axes.set_title("LSTM with a decoder" if model == "LSTM" else "Two layers, fed back")
            axes.set_xscale("log")
            axes.set_xlabel("position in the test sequence")
            axes.set_ylim(0, 1.05)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("share of right sums")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", title="trained with")
        figure.suptitle("Prefix sums modulo n, on the model's own outputs")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.Parser("prefix_sum", __doc__, FULL, QUICK).options(arguments)
    output = common.Output("prefix_sum", options)
    sizes = options.sizes
    test, seeds = sizes.pop("test"), sizes.pop("seeds")
    lengths = list(SHARES)[:2] if options.quick else list(SHARES)
    cases = [
        # A step draws by seed + step: seeds this far apart share no sequence.
        (model, method, length, options.seed + number * sizes["steps"])
        for model in MODELS
        for method in (PLAIN, TRUNCATED, FORCED)
        for length in lengths
        if method != TRUNCATED or length > CHUNK
        for number in range(seeds if (model, method, length) == SEEDED else 1)
    ]
    steps = {
        (method, length): max(1, int(sizes["steps"] * (SHARES[length], 1)[method == TRUNCATED]))
        for _, method, length, _ in cases
    }
    backends = {"LSTM": common.BACKENDS[options.backend], "two layers": ["torch.nn"]}
    output(
        f"Sums modulo {sizes['n']}, {sizes['hidden']} units, batch {sizes['batch']}; accuracy: "
        f"sums that are right on the model's own outputs, in sequences of {test:,}"
    )
    rows = []
    titles = ("updates", "loss", "accuracy", "ms an update")
    output.row("model, trained with, length, backend", titles)
    with common.progress(sum(steps[c[1:3]] * len(backends[c[0]]) for c in cases)) as bar:
        for model, method, length, seed in cases:
            bar.title(f"{model}, {method}, {length}")
            runs = train(
                backends[model],
                model,
                method,
                length,
                **{**sizes, "steps": steps[method, length]},
                seed=seed,
                trainer=partial(common.train, on_step=bar.step),
            )
            correct = {
                backend: evaluate(run.model, sizes["n"], test, seed)
                for backend, run in runs.items()
            }
            rows.append(Trained(model, method, length, seed, runs, correct))
            more = f", seed {seed}" if seed != options.seed else ""
            for backend, run in runs.items():
                output.row(
                    f"{model}, {method}, {length}{more}, {backend}",
                    [
                        f"{len(run.losses)}",
                        fmean(run.losses[-50:]),
                        shown(rows[-1].accuracy(backend)),
                        f"{1e3 * median(run.seconds):.1f}",
                    ],
                )
    output("\nIn brackets: the accuracy, rounded down, of several seeds the worst")
    for finding, verdict in findings(rows):
        output(f"{finding:<44} {verdict}")
    output()
    for row in rows:
        title = f"{row.model}, {row.method}, length {row.length}, seed {row.seed}"
        if (row.model, row.method, row.length) not in (SEEDED, ("LSTM", FORCED, 200)):
            output.training(row.runs, title)
        else:
            output(f"{title}:")
            output.agreement(row.runs, title)
            values = {backend: row.accuracy(backend, 200) for backend in row.runs}
            output.threshold("accuracy of 200 steps", values, at_least=LEARNED)
    draw(rows, output.picture)
    return output.close("Accuracy against position")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
