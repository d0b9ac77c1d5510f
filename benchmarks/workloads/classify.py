"""Which language is this snippet in? Many to one: a sequence is read, its last state classified.

Data: snippets of 10 to 100 characters from what is installed with Python: the source of the
standard library, the headers of Python (C) and of torch (C++), and prose: Python's own reference,
which pydoc holds, and the descriptions of installed packages. Every tenth file is held out.

Input: characters [T, B], packed by length; output: logits [B, kinds]. Two models: an LSTM whose
last state is decoded, and a bidirectional one (Schuster and Paliwal, 1997), whose backward
direction ends at the first character, so that the last states of both are decoded together.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from . import char_lm, common
from .common import Run

MODELS = {"last state": False, "bidirectional": True}
SHORTEST = 10
FILES = 300  # of a kind, at most
FULL = {"steps": 1200, "hidden": 64, "batch": 32, "length": 100}
QUICK = {"steps": 600, "hidden": 64, "batch": 32, "length": 100}
LEARNED = 0.8


def headers(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.h"))[:FILES]]


def corpus() -> dict[str, list[bytes]]:
    """Kind -> texts, no text twice."""
    packages = sorted(importlib.metadata.distributions(), key=lambda item: item.name)
    described = [item.read_text("METADATA") or "" for item in packages]
    texts = {
        "Python": [path.read_bytes() for path in char_lm.standard_files()],
        "C": headers(Path(sysconfig.get_paths()["include"])),
        "C++": headers(Path(torch.__file__).parent / "include" / "ATen"),
        "prose": [text.encode() for text in (*topics.topics.values(), *described)],
    }
    for kind, found in texts.items():
        texts[kind] = [text for text in dict.fromkeys(found) if len(text) > 100]
        if len(texts[kind]) < 10:
            raise SystemExit(
                f"classify: expected at least 10 files of {kind}, found {len(texts[kind])}; "
                "install Python's source and headers (python3-dev) and torch by pip"
            )
    return texts


def split(texts: dict[str, list[bytes]]) -> tuple[list[Tensor], list[Tensor]]:
    """(training, held-out): for every kind its tokens, one text after the other."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for found in texts.values():
        held_out = found[5::10]
        training = [text for i, text in enumerate(found) if i % 10 != 5]
        for part, chosen in zip(parts, (training, held_out), strict=True):
            part.append(char_lm.encode(b"\n".join(chosen)))
    return parts


def snippets(kinds: Sequence[Tensor], length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [length, B], how many of them count [B], and the kind [B]."""
    target = torch.randint(len(kinds), (batch,))
    lengths = torch.randint(min(SHORTEST, length), length + 1, (batch,))
    columns = []
    for kind in target.tolist():
        tokens = kinds[kind]
        start = int(torch.randint(len(tokens) - length, ()))
        columns.append(tokens[start : start + length])
    return torch.stack(columns, 1), lengths, target


class Classifier(nn.Module):
    def __init__(self, kinds: int, hidden: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(char_lm.UNKNOWN + 1, hidden)
        self.lstm = nn.LSTM(hidden, hidden, bidirectional=bidirectional)
        self.linear = nn.Linear(hidden * (1 + bidirectional), kinds)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens [T, B], lengths [B] -> logits [B, kinds]."""
        packed = pack_padded_sequence(self.embedding(tokens), lengths, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)  # [directions, B, H], each where its reading ends
        return self.linear(h_n.transpose(0, 1).flatten(1))


def train(
    backends: Sequence[str],
    kinds: Sequence[Tensor],
    *,
    bidirectional: bool,
    steps: int,
    hidden: int,
    batch: int,
    length: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    torch.manual_seed(seed)
    model = Classifier(len(kinds), hidden, bidirectional)

    def loss(run: Run, step: int) -> Tensor:
        tokens, lengths, target = snippets(kinds, length, batch)
        return F.cross_entropy(run.model(tokens, lengths), target)

    return trainer(backends, model, loss, steps=steps, seed=seed, calls=1, learning_rate=1e-2)


@torch.no_grad()
def evaluate(
    model: nn.Module, kinds: Sequence[Tensor], length: int, seed: int, count: int = 4000
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `count` snippets: lengths, kinds, and the kinds that the model takes them for."""
    torch.manual_seed(seed + 2**31)
    tokens, lengths, target = snippets(kinds, length, count)
    return lengths, target, model(tokens, lengths).argmax(-1)


def draw(names: Sequence[str], seen: dict[str, tuple[Tensor, Tensor, Tensor]], path: Path) -> None:
    """Accuracy against the snippet's length, and what is taken for what."""
    with common.figure(path, 1, 2, size=(9, 4)) as (_, (left, right)):
        for (model, (lengths, target, guess)), colour in zip(
            seen.items(), ("tab:blue", "tab:red"), strict=True
        ):
            edges = torch.linspace(lengths.min(), lengths.max() + 1, 10).tolist()
            right_ones = (target == guess).float()
            spans = [
                ((low + high) / 2, right_ones[(lengths >= low) & (lengths < high)].mean())
                for low, high in pairwise(edges)
            ]
            left.plot(*zip(*spans, strict=True), "o-", color=colour, label=model, linewidth=2)
        left.set_xlabel("characters read")
        left.set_ylabel("accuracy on held-out files")
        left.set_ylim(top=1.0)
        left.grid(alpha=0.3)
        left.legend(loc="lower right")
        left.set_title("How many characters are enough")
        _, target, guess = list(seen.values())[-1]
        counts = torch.zeros(len(names), len(names))
        counts.index_put_((target, guess), torch.ones(len(target)), accumulate=True)
        shares = counts / counts.sum(1, keepdim=True)
        right.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in zip(
            torch.cartesian_prod(*[torch.arange(len(names))] * 2).tolist(),
            shares.flatten().tolist(),
            strict=True,
        ):
            colour = "white" if share > 0.5 else "black"
            right.text(column, row, f"{share:.1%}", ha="center", va="center", color=colour)
        right.set_xticks(range(len(names)), names)
        right.set_yticks(range(len(names)), names)
        right.set_xlabel("taken for")
        right.set_ylabel("is")
        right.set_title("Bidirectional")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.Parser("classify", __doc__, FULL, QUICK).options(arguments)
    output = common.Output("classify", options)
    texts = corpus()
    names = list(texts)
    training, held_out = split(texts)
    for name, ours, theirs in zip(names, training, held_out, strict=True):
        output(f"{name}: {len(ours):,} characters to train on, {len(theirs):,} held out")
    if min(map(len, held_out)) <= options.length:
        raise SystemExit(f"classify: --length {options.length} is more than was held out")
    seen = {}
    for model, bidirectional in MODELS.items():
        output(f"\n{model}, {options.hidden} units, batch {options.batch}")
        runs = train(
            common.BACKENDS[options.backend],
            training,
            bidirectional=bidirectional,
            seed=options.seed,
            trainer=partial(output.train, "training loss"),
            **options.sizes,
        )
        output.times(runs, options.batch, "snippets")
        output.agreement(runs, model)
        accuracies = {}
        for backend, run in runs.items():
            seen[model] = evaluate(run.model, held_out, options.length, options.seed)
            accuracies[backend] = (seen[model][1] == seen[model][2]).float().mean().item()
        name = f"accuracy on held-out snippets of {SHORTEST} to {options.length} characters"
        output.threshold(name, accuracies, at_least=LEARNED)
    draw(names, seen, output.picture)
    return output.close("Accuracy against length, and confusions")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
