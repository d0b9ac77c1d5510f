"""A character-level language model, trained with torch.nn and with fusedrnn side by side, on text
that every machine has: the source of the Python standard library. `python -m
benchmarks.workloads.char_lm` prints both losses, the speed and a sample, and draws the loss against
time. It times whole training steps; for the recurrence alone see benchmarks/table.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

from .. import common

SYMBOLS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
UNKNOWN = len(SYMBOLS)  # every other byte: a tab, a letter beyond ASCII
BACKENDS = {"torch": ["torch.nn"], "fusedrnn": ["fusedrnn"], "both": ["torch.nn", "fusedrnn"]}
BLOCK = 10  # steps that one backend runs before it is the other's turn
CHECKPOINTS = 10
FULL = {"steps": 4000, "hidden": 128, "batch": 16, "chunk": 64}
QUICK = {"steps": 50, "hidden": 64, "batch": 8, "chunk": 32}
HELD_OUT = 100_000  # characters, enough for two digits of the held-out loss in a second or two
# Tests, tables of characters and what is no part of the library: text unlike ordinary Python.
LEFT_OUT = {"test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
LEFT_OUT |= {"site-packages", "dist-packages"}


def encode(text: bytes) -> Tensor:
    """text -> [len(text)] int64, indices into SYMBOLS or UNKNOWN."""
    table = torch.full((256,), UNKNOWN)
    table[torch.tensor(list(SYMBOLS.encode()))] = torch.arange(len(SYMBOLS))
    return table[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]


def corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as (training, held-out) tokens; every 20th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    if len(files) < 20:
        raise SystemExit(
            f"char_lm: expected the source of Python's standard library in {root}, found "
            f"{len(files)} files; install the package of your system that holds it"
        )
    texts = [path.read_bytes() for path in files]
    held_out = texts[10::20]
    del texts[10::20]
    return encode(b"\n".join(texts)), encode(b"\n".join(held_out))


class CharModel(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(UNKNOWN + 1, hidden)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2, dropout=dropout)
        self.linear = nn.Linear(hidden, UNKNOWN + 1)

    def forward(self, input: Tensor, hx: tuple | None = None) -> tuple[Tensor, tuple]:
        """input [T, B] tokens, hx the LSTM's -> logits [T, B, UNKNOWN + 1], hx."""
        output, hx = self.lstm(self.embedding(input), hx)
        return self.linear(output), hx


class Streams:
    """Tokens as B streams read side by side, a chunk of T at a time, so that state carries over."""

    def __init__(self, tokens: Tensor, batch: int, chunk: int) -> None:
        length = len(tokens) // batch
        self.tokens = tokens[: length * batch].view(batch, length).t().contiguous()
        self.chunk = chunk
        self.chunks = (length - 1) // chunk
        if not self.chunks:
            raise ValueError(f"{batch} streams of {chunk + 1} need more than {len(tokens)} tokens")

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Chunk `index`: input [T, B] and target [T, B], the input one character later."""
        start = index * self.chunk
        end = start + self.chunk
        return self.tokens[start:end], self.tokens[start + 1 : end + 1]


@dataclass
class Run:
    """One backend's model and what its training has shown so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    hx: tuple | None = None
    losses: list[float] = field(default_factory=list)  # bits per character, each step
    seconds: list[float] = field(default_factory=list)  # each step
    counts: dict[str, int] = field(default_factory=dict)  # fusedrnn.ops.counts, this run's share

    def step(self, input: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits, hx = self.model(input, self.hx)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.hx = tuple(state.detach() for state in hx)
        self.losses.append(loss.item() / math.log(2))
        self.seconds.append(time.perf_counter() - start)


def train(
    backends: Sequence[str],
    tokens: Tensor,
    *,
    hidden: int,
    batch: int,
    chunk: int,
    steps: int,
    seed: int,
    dropout: float = 0.1,
    learning_rate: float = 6e-3,
    on_step: Callable[[str, dict[str, Run]], None] = lambda backend, runs: None,
) -> dict[str, Run]:
    """Trains the same model once a backend, "torch.nn" or "fusedrnn", in turns of BLOCK steps.

    Weights, data and dropout are the same for all. Raises RuntimeError if a step of fusedrnn's ran
    on anything but its kernels.
    """
    streams = Streams(tokens, batch, chunk)
    torch.manual_seed(seed)
    original = CharModel(hidden, dropout)
    runs = {}
    for backend in backends:
        model = copy.deepcopy(original)
        if backend == "fusedrnn":
            fusedrnn.replace(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)
        runs[backend] = Run(model, optimizer, scheduler)
    for first in range(0, steps, BLOCK):
        for backend, run in runs.items():
            before = dict(fusedrnn.ops.counts)
            for step in range(first, min(first + BLOCK, steps)):
                if step % streams.chunks == 0:
                    run.hx = None  # the text starts anew
                torch.manual_seed(seed + step)  # the same dropout in every backend
                run.step(*streams[step % streams.chunks])
                on_step(backend, runs)
            for name, count in fusedrnn.ops.counts.items():
                run.counts[name] = run.counts.get(name, 0) + count - before[name]
    for backend, run in runs.items():
        calls = steps * original.lstm.num_layers if backend == "fusedrnn" else 0
        wanted = {"kernel_forward": calls, "kernel_backward": calls}
        if run.counts != {name: wanted.get(name, 0) for name in run.counts}:
            raise RuntimeError(
                f"{backend}: expected {wanted} calls of fusedrnn's kernels and nothing else, "
                f"counted {run.counts}; `python -m fusedrnn` says what is wrong"
            )
    return runs


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, batch: int, chunk: int) -> float:
    """Bits per character over tokens, without dropout."""
    model.eval()
    streams = Streams(tokens, batch, chunk)
    hx, losses = None, []
    for index in range(streams.chunks):
        input, target = streams[index]
        logits, hx = model(input, hx)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()).item())
    return fmean(losses) / math.log(2)


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int, temperature: float, seed: int) -> str:
    """prompt and `length` characters drawn one by one from the model's probabilities."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    logits, hx = model(encode(prompt.encode())[:, None])
    text = prompt
    for _ in range(length):
        token = torch.multinomial(F.softmax(logits[-1, 0] / temperature, 0), 1, generator=generator)
        text += SYMBOLS[token] if token < UNKNOWN else "\N{REPLACEMENT CHARACTER}"
        logits, hx = model(token[:, None], hx)
    return text


def speedup(runs: dict[str, Run]) -> float:
    """How many times faster fusedrnn's median step is."""
    return median(runs["torch.nn"].seconds) / median(runs["fusedrnn"].seconds)


def line(title: str, values: Sequence[str]) -> str:
    return f"{title:>36}" + "".join(f"{value:>12}" for value in values)


def train_with_progress(backends: Sequence[str], tokens: Tensor, **options) -> dict[str, Run]:
    """train() under a bar that shows the time left, with a line of losses at every checkpoint."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    marks = [math.ceil(options["steps"] * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)]
    since = {mark: start for start, mark in itertools.pairwise(marks)}
    columns = [
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    ]
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=options["steps"] * len(backends))
        progress.console.print(line("training loss, bits per character", backends))

        def on_step(backend: str, runs: dict[str, Run]) -> None:
            progress.advance(task)
            done = len(runs[backend].losses)
            if backend == backends[-1] and done in since:  # the others have been there
                losses = [fmean(run.losses[since[done] : done]) for run in runs.values()]
                progress.console.print(
                    line(f"steps {since[done] + 1} to {done}", [f"{x:.4f}" for x in losses])
                )

        return train(backends, tokens, on_step=on_step, **options)


def report(runs: dict[str, Run], held_out: dict[str, float], tokens_per_step: int) -> None:
    milliseconds = {backend: 1e3 * median(run.seconds) for backend, run in runs.items()}
    print(line("held-out loss, bits per character", [f"{x:.4f}" for x in held_out.values()]))
    print(line("ms a step, median", [f"{x:.1f}" for x in milliseconds.values()]))
    rates = [tokens_per_step / x for x in milliseconds.values()]
    print(line("tokens (characters) a second", [f"{1e3 * x:,.0f}" for x in rates]))
    if len(runs) == 2:
        gaps = [abs(a - b) for a, b in zip(*(run.losses for run in runs.values()), strict=True)]
        print(
            f"Speed-up of a training step: {speedup(runs):.2f}x. Largest difference of a step's "
            f"loss: {max(gaps[:100]):.1e} in the first {len(gaps[:100])} steps, {max(gaps):.1e} "
            "in all (roundings grow as training goes on)."
        )
    if "fusedrnn" in runs:
        counts = runs["fusedrnn"].counts
        print(
            f"fusedrnn's kernels ran every step: {counts['kernel_forward']} calls forward, "
            f"{counts['kernel_backward']} backward, none by another path."
        )


def draw(runs: dict[str, Run], held_out: dict[str, float], path: Path) -> None:
    """The training loss against training time, a moving mean, for each backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (backend, run), colour in zip(runs.items(), ("tab:gray", "tab:red"), strict=False):
        window = max(1, len(run.losses) // 50)
        seconds = list(itertools.accumulate(run.seconds))
        losses = [fmean(run.losses[max(0, i - window) : i]) for i in range(1, len(seconds) + 1)]
        label = f"{backend}: {seconds[-1]:.0f} s, held-out {held_out[backend]:.3f} bits"
        axes.plot(seconds, losses, color=colour, linewidth=2, label=label)
        axes.plot(seconds[-1], losses[-1], "o", color=colour)
    title = "Character language model on Python's standard library"
    if len(runs) == 2:
        title += f"\nfusedrnn's median step is {speedup(runs):.2f} times as fast as torch.nn's"
    axes.set_title(title)
    axes.set_xlabel("training time (seconds)")
    axes.set_ylabel("training loss (bits per character)")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def temperature(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    positive_int = common.positive_int
    parser = common.Parser(prog="char_lm", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, default="both")
    parser.add_argument("--quick", action="store_true", help="a small model for a few seconds")
    parser.add_argument("--steps", type=positive_int, help="training steps of each backend")
    parser.add_argument("--hidden", type=positive_int, help="units of each LSTM layer")
    parser.add_argument("--batch", type=positive_int, help="streams of text read side by side")
    parser.add_argument("--chunk", type=positive_int, help="characters between two updates")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=temperature, default=0.6, help="of the sample")
    parser.add_argument("--length", type=positive_int, default=400, help="of the sample")
    parser.add_argument(
        "--out", type=Path, default=common.REPOSITORY / "benchmarks/results", help="for the picture"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63 - 2**32:  # torch takes 64 bits, and a step adds its number
        parser.error(f"argument --seed: expected a whole number from 0 up, got {options.seed}")
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    print(f"{common.machine()}, threads: {options.threads}")
    training, held_out = corpus()
    print(
        f"{len(training):,} characters to train on, {len(held_out):,} held out; 2-layer LSTM, "
        f"{options.hidden} units, batch {options.batch}, chunks of {options.chunk}"
    )
    sizes = {name: getattr(options, name) for name in FULL}
    runs = train_with_progress(BACKENDS[options.backend], training, seed=options.seed, **sizes)
    losses = {
        backend: evaluate(run.model, held_out[:HELD_OUT], options.batch, options.chunk)
        for backend, run in runs.items()
    }
    report(runs, losses, options.batch * options.chunk)
    backend, run = list(runs.items())[-1]
    print(f"\nA sample of the model trained with {backend}, temperature {options.temperature}:\n")
    print(sample(run.model, "\ndef ", options.length, options.temperature, options.seed))
    picture = options.out / "char_lm.png"
    draw(runs, losses, picture)
    print(f"\nLoss against time: {picture}")


if __name__ == "__main__":
    main()
