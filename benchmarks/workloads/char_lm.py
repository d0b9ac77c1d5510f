"""A character-level language model, trained with torch.nn and with fusedrnn side by side, on text
that every machine has: the source of the Python standard library. `python -m
benchmarks.workloads.char_lm` prints both losses, the speed and a sample, and draws the loss against
time. It times whole training steps; for the recurrence alone see benchmarks/table.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import positive_int
from . import common
from .common import Run

SYMBOLS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
UNKNOWN = len(SYMBOLS)  # every other byte: a tab, a letter beyond ASCII
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


def standard_files() -> list[Path]:
    """The files of the standard library, in the same order everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    if len(files) < 20:
        raise SystemExit(
            f"expected the source of Python's standard library in {root}, found {len(files)} "
            "files; install the package of your system that holds it"
        )
    return files


def corpus() -> tuple[Tensor, Tensor]:
    """The standard library's source as (training, held-out) tokens; every 20th file is held out."""
    texts = [path.read_bytes() for path in standard_files()]
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
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    """Trains the same model once a backend, by truncated BPTT: the state goes on from chunk to
    chunk, its gradient does not. Losses are in bits per character.
    """
    streams = Streams(tokens, batch, chunk)
    torch.manual_seed(seed)
    model = CharModel(hidden, dropout)

    def loss(run: Run, step: int) -> Tensor:
        index = step % streams.chunks
        if index == 0:
            run.state = None  # the text starts anew
        input, target = streams[index]
        logits, hx = run.model(input, run.state)
        run.state = tuple(state.detach() for state in hx)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    return trainer(
        backends,
        model,
        loss,
        steps=steps,
        seed=seed,
        calls=model.lstm.num_layers,
        learning_rate=6e-3,
        unit=math.log(2),
    )


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


def draw(runs: dict[str, Run], held_out: dict[str, float], path: Path) -> None:
    """The training loss against training time, a moving mean, for each backend."""
    with common.figure(path, size=(8, 4.5)) as (_, axes):
        for backend, run in runs.items():
            seconds = list(itertools.accumulate(run.seconds))
            losses = common.moving_mean(run.losses)
            label = f"{backend}: {seconds[-1]:.0f} s, held-out {held_out[backend]:.3f} bits"
            colour = common.COLOURS[backend]
            axes.plot(seconds, losses, color=colour, linewidth=2, label=label)
            axes.plot(seconds[-1], losses[-1], "o", color=colour)
        title = "Character language model on Python's standard library"
        if len(runs) == 2:
            times = f"{common.speedup(runs):.2f} times as fast as torch.nn's"
            title += f"\nfusedrnn's median step is {times}"
        axes.set_title(title)
        axes.set_xlabel("training time (seconds)")
        axes.set_ylabel("training loss (bits per character)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    def temperature(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    parser = common.Parser("char_lm", __doc__, FULL, QUICK)
    parser.add_argument("--temperature", type=temperature, default=0.6, help="of the sample")
    parser.add_argument("--length", type=positive_int, default=400, help="of the sample")
    return parser.options(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    output = common.Output("char_lm", options)
    training, held_out = corpus()
    output(
        f"{len(training):,} characters to train on, {len(held_out):,} held out; 2-layer LSTM, "
        f"{options.hidden} units, batch {options.batch}, chunks of {options.chunk}"
    )
    runs = train(
        common.BACKENDS[options.backend],
        training,
        seed=options.seed,
        trainer=partial(output.train, "training loss, bits per character"),
        **options.sizes,
    )
    losses = {
        backend: evaluate(run.model, held_out[:HELD_OUT], options.batch, options.chunk)
        for backend, run in runs.items()
    }
    output.row("held-out loss, bits per character", list(losses.values()))
    output.measured("held-out loss, bits per character", losses)
    output.times(runs, options.batch * options.chunk, "tokens (characters)")
    output.agreement(runs)
    backend, run = list(runs.items())[-1]
    output(f"\nA sample of the model trained with {backend}, temperature {options.temperature}:\n")
    output(sample(run.model, "\ndef ", options.length, options.temperature, options.seed))
    draw(runs, losses, output.picture)
    return output.close("Loss against time")


if __name__ == "__main__":
    main()
