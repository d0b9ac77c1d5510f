"""Character-level language models, trained with torch.nn and with fusedrnn side by side, on text
that every machine has: the source of the Python standard library. `python -m
benchmarks.workloads.char_lm` prints both losses, the speed and a sample, and draws the loss against
time. It times whole training steps; for the recurrence alone see `python -m benchmarks run`.
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
# (cell, layers, input). The first is trained for all steps, the others for a part of them.
MODELS = (
    ("LSTM", 2, "embedding"),
    ("LSTM", 3, "onehot"),
    ("GRU", 1, "onehot"),
    ("RNN", 2, "embedding"),
)
OTHERS_PART = 2
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


def trigram_bits(training: Tensor, held_out: Tensor) -> float:
    """Bits per held-out character, foretold from the two before it by their counts in `training`,
    with one added to each count."""
    symbols = UNKNOWN + 1

    def triples(tokens: Tensor) -> Tensor:
        return (tokens[:-2] * symbols + tokens[1:-1]) * symbols + tokens[2:]

    counts = 1.0 + torch.bincount(triples(training), minlength=symbols**3).view(-1, symbols)
    probabilities = counts / counts.sum(1, keepdim=True)
    return -probabilities.flatten()[triples(held_out)].log2().mean().item()


class CharModel(nn.Module):
    """cell: LSTM, GRU or RNN; input: embedding, or onehot."""

    def __init__(
        self,
        hidden: int,
        dropout: float,
        cell: str = "LSTM",
        layers: int = 2,
        input: str = "embedding",
    ) -> None:
        super().__init__()
        symbols = UNKNOWN + 1
        self.embedding = nn.Embedding(symbols, hidden) if input == "embedding" else None
        self.recurrent = getattr(nn, cell)(
            hidden if self.embedding else symbols,
            hidden,
            num_layers=layers,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.linear = nn.Linear(hidden, symbols)

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """input [T, B] tokens, hx the recurrent layers' -> logits [T, B, UNKNOWN + 1], hx."""
        if self.embedding is None:
            vectors = F.one_hot(input, UNKNOWN + 1).to(self.linear.weight.dtype)
        else:
            vectors = self.embedding(input)
        output, hx = self.recurrent(vectors, hx)
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
    kind: tuple[str, int, str] = MODELS[0],
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    """Trains the same model once a backend, by truncated BPTT: the state goes on from chunk to
    chunk, its gradient does not. Losses are in bits per character. `kind` is one of MODELS.
    """
    streams = Streams(tokens, batch, chunk)
    torch.manual_seed(seed)
    model = CharModel(hidden, dropout, *kind)

    def loss(run: Run, step: int) -> Tensor:
        index = step % streams.chunks
        if index == 0:
            run.state = None  # the text starts anew
        input, target = streams[index]
        logits, hx = run.model(input, run.state)
        run.state = tuple(s.detach() for s in hx) if isinstance(hx, tuple) else hx.detach()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    return trainer(
        backends,
        model,
        loss,
        steps=steps,
        seed=seed,
        calls=model.recurrent.num_layers,
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


def title_of(kind: tuple[str, int, str]) -> str:
    cell, layers, input = kind
    return f"{cell}, {layers} layer{'s' * (layers > 1)}, {input}"


def draw(
    trained: dict[str, dict[str, Run]], held_out: dict[str, dict[str, float]], path: Path
) -> None:
    """The training loss against training time, a moving mean, of each model and backend."""
    columns = min(2, len(trained))
    rows = math.ceil(len(trained) / columns)
    with common.figure(path, rows, columns, size=(8 * columns, 4.5 * rows)) as (figure, axes):
        figure.suptitle("Character language models on Python's standard library")
        for ax, (title, runs) in zip(
            axes.flat if columns > 1 else [axes], trained.items(), strict=False
        ):
            for backend, run in runs.items():
                seconds = list(itertools.accumulate(run.seconds))
                losses = common.moving_mean(run.losses)
                label = (
                    f"{backend}: {seconds[-1]:.0f} s, held-out {held_out[title][backend]:.3f} bits"
                )
                colour = common.COLOURS[backend]
                ax.plot(seconds, losses, color=colour, linewidth=2, label=label)
                ax.plot(seconds[-1], losses[-1], "o", color=colour)
            if common.both(runs):
                title += f": a step {common.speedup(runs):.2f} times as fast as torch.nn's"
            ax.set_title(title)
            ax.set_xlabel("training time (seconds)")
            ax.set_ylabel("training loss (bits per character)")
            ax.set_xlim(left=0)
            ax.grid(alpha=0.3)
            ax.legend()


def make_parser() -> common.Parser:
    def temperature(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    parser = common.Parser("char_lm", __doc__, FULL, QUICK)
    parser.add_argument("--cell", choices=["LSTM", "GRU", "RNN"], help="this model alone")
    parser.add_argument("--layers", type=positive_int, help="of this model alone, usually 2")
    parser.add_argument("--input", choices=["embedding", "onehot"], help="of this model alone")
    parser.add_argument("--temperature", type=temperature, default=0.6, help="of the sample")
    parser.add_argument("--length", type=positive_int, default=400, help="of the sample")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = make_parser()
    options = parser.options(arguments)
    training, held_out = corpus()
    evaluated = held_out[:HELD_OUT]
    try:
        Streams(evaluated, options.batch, options.chunk)
    except ValueError as error:
        parser.error(f"arguments --batch, --chunk: {error}")
    one = (options.cell, options.layers, options.input)
    kinds: Sequence[tuple[str, int, str]] = MODELS
    if any(one):
        kinds = [(one[0] or "LSTM", one[1] or 2, one[2] or "embedding")]
    output = common.Output("char_lm", options)
    output(
        f"{len(training):,} characters to train on, {len(evaluated):,} held-out ones to test on; "
        f"{options.hidden} units, batch {options.batch}, chunks of {options.chunk}"
    )
    bound = trigram_bits(training, evaluated)
    trained, losses = {}, {}
    for kind in kinds:
        title = title_of(kind)
        output(f"\n{title}")
        steps = options.steps if kind == kinds[0] else math.ceil(options.steps / OTHERS_PART)
        trained[title] = runs = train(
            common.BACKENDS[options.backend],
            training,
            seed=options.seed,
            kind=kind,
            trainer=partial(output.train, "training loss, bits per character"),
            **(options.sizes | {"steps": steps}),
        )
        losses[title] = {
            backend: evaluate(run.model, evaluated, options.batch, options.chunk)
            for backend, run in runs.items()
        }
        output.row("held-out loss, bits per character", list(losses[title].values()))
        output.threshold(
            f"{title}: held-out bits per character (threshold: of character trigrams)",
            losses[title],
            at_most=round(bound, 3),
        )
        output.times(runs, options.batch * options.chunk, "tokens (characters)")
        output.agreement(runs, title)
    backend, run = list(trained[title_of(kinds[0])].items())[-1]
    output(
        f"\nA sample of the first model trained with {backend}, temperature "
        f"{options.temperature}:\n"
    )
    output(sample(run.model, "\ndef ", options.length, options.temperature, options.seed))
    draw(trained, losses, output.picture)
    return output.close("Loss against time")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
