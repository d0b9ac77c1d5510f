"""Dates in many written forms to ISO 8601, a character at a time: an encoder reads the one, a
decoder that starts from its last state writes the other (Sutskever et al., 2014; Cho et al., 2014).

Data: every day of 1950 to 2049 in ten forms, drawn at random; days that training never draws are
for the test. Input: characters [T, B], packed by length; output: START, ten characters, END.

Teacher forcing: the decoder's next input is the right character with a probability, else its own
(scheduled sampling, Bengio et al., 2015). Trained with 1, one half and 0, and tested on its own
outputs, the likeliest ones (greedy) and such as are drawn from its probabilities (sampled).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from . import common
from .common import Run

FIRST, DAYS = datetime.date(1950, 1, 1), 36525
HELD_OUT = 7  # every seventh day
MONTHS = "January February March April May June July August September October November December"
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
TARGETS = "0123456789-"
START, END = len(TARGETS), len(TARGETS) + 1
LENGTH = 11  # of the output, END included
PROBABILITIES = (1.0, 0.5, 0.0)  # of teacher forcing
FULL = {"steps": 600, "hidden": 128, "batch": 64}
QUICK = {"steps": 300, "hidden": 128, "batch": 48}
LEARNED = 0.95


def ordinal(day: int) -> str:
    ending = "th" if 4 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{ending}"


def write(date: datetime.date, form: int) -> str:
    """The date in one of ten forms, none of which can be taken for another date."""
    day, year = date.day, date.year
    month, weekday = MONTHS.split()[date.month - 1], WEEKDAYS.split()[date.weekday()]
    return (
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"{weekday}, {day} {month} {year}",
        f"{weekday}, the {ordinal(day)} of {month}, {year}",
        f"{day:02}.{date.month:02}.{year}",
        f"{date.month}/{day}/{year}",
        f"{day:02}-{month[:3].upper()}-{year % 100:02}",
        f"{weekday[:3]} {month[:3]} {day:2} 00:00:00 {year}",
        f"{month[:3].lower()} {ordinal(day)} '{year % 100:02}",
        f"{year}, {month} {day}",
    )[form]


def pairs(batch: int, held_out: bool) -> tuple[list[str], list[str]]:
    """Written dates and the same as ISO, on days that are held out or on days that are not."""
    written, iso = [], []
    while len(iso) < batch:
        day, form = int(torch.randint(DAYS, ())), int(torch.randint(10, ()))
        if (day % HELD_OUT == 0) == held_out:
            date = FIRST + datetime.timedelta(day)
            written.append(write(date, form))
            iso.append(date.isoformat())
    return written, iso


def encode(written: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Characters [T, B] and how many of them count [B]."""
    columns = [torch.tensor(list(text.encode("ascii"))) for text in written]
    return pad_sequence(columns), torch.tensor([len(column) for column in columns])


def encode_target(iso: Sequence[str]) -> Tensor:
    """[LENGTH, B] indices into TARGETS, then END."""
    return torch.tensor([[*map(TARGETS.index, text), END] for text in iso]).t().contiguous()


class Seq2Seq(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.source = nn.Embedding(128, hidden)
        self.encoder = nn.LSTM(hidden, hidden)
        self.target = nn.Embedding(len(TARGETS) + 2, hidden)
        self.decoder = nn.LSTMCell(hidden, hidden)
        self.linear = nn.Linear(hidden, len(TARGETS) + 2)

    def forward(
        self,
        source: Tensor,
        lengths: Tensor,
        target: Tensor | None = None,
        forcing: float = 0.0,
        sampled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Source [T, B], lengths [B], target [LENGTH, B] -> logits [LENGTH, B, characters] and the
        characters written [LENGTH, B].
        """
        packed = pack_padded_sequence(self.source(source), lengths, enforce_sorted=False)
        _, (h_n, c_n) = self.encoder(packed)
        state, token = (h_n[0], c_n[0]), torch.full_like(lengths, START)
        logits, written = [], []
        for step in range(LENGTH):
            state = self.decoder(self.target(token), state)
            logits.append(self.linear(state[0]))
            if sampled:
                token = torch.multinomial(logits[-1].softmax(-1), 1)[:, 0]
            else:
                token = logits[-1].argmax(-1)
            written.append(token)
            if target is not None and forcing:
                told = torch.rand(len(token)) < forcing
                token = torch.where(told, target[step], token)
        return torch.stack(logits), torch.stack(written)


def train(
    backends: Sequence[str],
    forcing: float,
    *,
    steps: int,
    hidden: int,
    batch: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        written, iso = pairs(batch, held_out=False)
        target = encode_target(iso)
        logits, _ = run.model(*encode(written), target, forcing)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    return trainer(
        backends,
        Seq2Seq(hidden),
        loss,
        steps=steps,
        seed=seed,
        calls=1 + LENGTH,
        learning_rate=5e-3,
    )


@torch.no_grad()
def evaluate(model: nn.Module, seed: int, sampled: bool, count: int = 1000) -> float:
    """The share of held-out days that are written right to the last character."""
    torch.manual_seed(seed + 2**31)
    written, iso = pairs(count, held_out=True)
    _, tokens = model(*encode(written), sampled=sampled)
    return (tokens == encode_target(iso)).all(0).float().mean().item()


@torch.no_grad()
def translate(model: nn.Module, written: Sequence[str]) -> list[str]:
    _, tokens = model(*encode(written))
    characters = TARGETS + "^$"
    return ["".join(characters[i] for i in column).rstrip("$") for column in tokens.t().tolist()]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.Parser("seq2seq", __doc__, FULL, QUICK).options(arguments)
    output = common.Output("seq2seq", options)
    backends = common.BACKENDS[options.backend]
    output(f"LSTM encoder and decoder, {options.hidden} units, batch {options.batch}")
    greedy = {}
    for forcing in PROBABILITIES:
        output(f"\nteacher forcing with probability {forcing:g}")
        runs = train(
            backends,
            forcing,
            seed=options.seed,
            trainer=partial(output.train, "training loss"),
            **options.sizes,
        )
        for sampled in (False, True):
            exact = {name: evaluate(run.model, options.seed, sampled) for name, run in runs.items()}
            if not sampled:
                greedy[forcing] = exact
            title = "sampled" if sampled else "greedy"
            output.row(f"exact matches, {title}", list(exact.values()))
        output.times(runs, options.batch, "dates")
        output.agreement(runs, f"teacher forcing {forcing:g}")
        if forcing == PROBABILITIES[0]:
            torch.manual_seed(options.seed)
            written, _ = pairs(8, held_out=True)
            examples = list(zip(written, translate(runs[backends[-1]].model, written), strict=True))
    output("\nHeld-out days, by the model of " + backends[-1] + ":")
    for text, iso in examples:
        output(f"{text:>42}  {iso}")
    output()
    for forcing, exact in greedy.items():
        name = f"exact matches, teacher forcing {forcing:g}"
        output.threshold(name, exact, at_least=LEARNED)
    return output.close()


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
