"""Questions about a picture, and answers: sequence to sequence, where the decoder sees nothing but
the encoder's last state (visual question answering, after Malinowski et al., 2015, and Ren et al.,
2015).

Data: the scenes of captioning, and of each a question from six templates, such as "what is left of
the blue square ?", with its answer in words. An LSTM reads the question [T, B], packed by length,
and at every step, as in its first state, the feature vector that a CNN makes of the picture; from
its last state another writes the answer, START first, till END. The pairs of objects of the test
are in no training scene. As a control, the same model without the picture: what questions alone
give away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from . import common, scenes
from .common import Run
from .scenes import Scene, Vocabulary

WORDS = Vocabulary(
    "what is there ? how many thing things are colour shape size the a one two yes no nothing "
    + " ".join(["left right of above below", *scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES])
)
KINDS = ("how many", "is there", "colour", "shape", "size", "where")
LONGEST = 5  # words of an answer and END
PICTURES = {"with picture": True, "without it": False}
FULL = {"steps": 3000, "hidden": 128, "batch": 64}
QUICK = {"steps": 800, "hidden": 96, "batch": 48}
LEARNED = 0.8


def choose(items: Sequence[str]) -> str:
    return items[int(torch.randint(len(items), ()))]


def ask(scene: Scene) -> tuple[str, str, str]:
    """A question about the scene that has one answer: its kind, its words and the answer's."""
    things = scene.things
    place = int(torch.randint(len(things), ()))
    thing, others = things[place], things[:place] + things[place + 1 :]
    kind = choose(KINDS)
    if kind == "how many":
        return kind, "how many things are there ?", ("one", "two")[len(others)]
    if kind == "is there":
        colour, shape = choose(list(scenes.COLOURS)), choose(scenes.SHAPES)
        if torch.rand(()) < 0.5:
            colour, shape = thing.colour, thing.shape
        found = any((one.colour, one.shape) == (colour, shape) for one in things)
        return kind, f"is there a {colour} {shape} ?", "yes" if found else "no"
    # These name the thing by what they do not ask for, if that tells it from the other one.
    told = {"colour": ["shape"], "size": ["shape"], "shape": ["colour"]}.get(kind)
    told = told or ["colour", "shape"]
    if any(all(getattr(one, t) == getattr(thing, t) for t in told) for one in others):
        return ask(scene)
    name = " ".join(getattr(thing, t) for t in told)
    if kind == "where":
        sides = ("above", "below") if scene.above else ("left of", "right of")
        side = choose(("above", "below", "left of", "right of"))
        if torch.rand(()) < 0.5:
            side = sides[1 - place]
        found = others and side == sides[1 - place]
        return kind, f"what is {side} the {name} ?", str(others[0]) if found else "nothing"
    name += " thing" * (kind == "shape")
    return kind, f"what {kind} is the {name} ?", getattr(thing, kind)


class Dialogue(nn.Module):
    def __init__(self, hidden: int, sees: bool) -> None:
        super().__init__()
        self.cnn = scenes.CNN(3, hidden) if sees else None
        self.embedding = nn.Embedding(len(WORDS), hidden)
        self.encoder = nn.LSTM(hidden + hidden * sees, hidden)
        self.decoder = nn.LSTM(hidden, hidden)
        self.linear = nn.Linear(hidden, len(WORDS))

    def read(self, pictures: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
        """pictures [B, 3, side, side], questions [T, B] -> the encoder's last state."""
        input, hx = self.embedding(questions), None
        if self.cnn:
            features = self.cnn(pictures)
            input = torch.cat([input, features.expand(len(questions), -1, -1)], -1)
            hx = (features[None], torch.zeros_like(features)[None])
        lengths = (questions != WORDS.PAD).sum(0)
        _, hx = self.encoder(pack_padded_sequence(input, lengths, enforce_sorted=False), hx)
        return hx

    def forward(self, words: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
        """words [T, B] -> logits of the next ones [T, B, words], hx."""
        output, hx = self.decoder(self.embedding(words), hx)
        return self.linear(output), hx


def make_batch(batch: int, held_out: bool) -> tuple[Tensor, list[tuple[str, str, str]]]:
    """Pictures, and of each a kind, a question and its answer."""
    drawn = scenes.make_scenes(batch, held_out)
    return scenes.render(drawn), [ask(scene) for scene in drawn]


def train(
    backends: Sequence[str],
    sees: bool,
    *,
    steps: int,
    hidden: int,
    batch: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        pictures, asked = make_batch(batch, held_out=False)
        _, questions, answers = map(list, zip(*asked, strict=True))
        target = WORDS.encode(answers)
        hx = run.model.read(pictures, WORDS.encode(questions))
        logits, _ = run.model(scenes.after_start(target), hx)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=WORDS.PAD)

    model = Dialogue(hidden, sees)
    return trainer(backends, model, loss, steps=steps, seed=seed, calls=2, learning_rate=3e-3)


@torch.no_grad()
def answer(model: nn.Module, pictures: Tensor, questions: list[str]) -> list[str]:
    """An answer to each question, word by word, the likeliest one each time."""
    hx = model.read(pictures, WORDS.encode(questions))
    word = torch.full((1, len(questions)), WORDS.START)
    words = []
    for _ in range(LONGEST):
        logits, hx = model(word, hx)
        word = logits.argmax(-1)
        words.append(word)
    return WORDS.decode(torch.cat(words))


def evaluate(model: nn.Module, seed: int, count: int = 1000) -> dict[str, float]:
    """Kind of question, or "all" -> the share of answers without a wrong word."""
    torch.manual_seed(seed + 2**31)
    pictures, asked = make_batch(count, held_out=True)
    answers = answer(model, pictures, [question for _, question, _ in asked])
    right = defaultdict(list)
    for (kind, _, wanted), given in zip(asked, answers, strict=True):
        right[kind].append(float(given == wanted))
    shares = {kind: fmean(right[kind]) for kind in KINDS if right[kind]}
    return shares | {"all": fmean(x for values in right.values() for x in values)}


def draw(model: nn.Module, seed: int, path: Path) -> None:
    """Scenes of the test, a question about each, and the answer, in red where it is wrong."""
    torch.manual_seed(seed + 2**31)
    pictures, asked = make_batch(12, held_out=True)
    answers = answer(model, pictures, [question for _, question, _ in asked])
    with common.figure(path, 3, 4, size=(10, 8.2)) as (figure, grid):
        for axes, picture, (_, question, wanted), given in zip(
            grid.flat, pictures, asked, answers, strict=True
        ):
            axes.imshow(picture.permute(1, 2, 0))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(question, fontsize=9)
            axes.set_xlabel(given, fontsize=9, color="black" if given == wanted else "red")
        figure.suptitle("Scenes of held-out pairs, questions and answers (red: wrong)")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.Parser("dialogue", __doc__, FULL, QUICK).options(arguments)
    output = common.Output("dialogue", options)
    output(f"CNN and LSTMs, {options.hidden} units, batch {options.batch}")
    shares = {}
    for name, sees in PICTURES.items():
        output(f"\nquestions {name}")
        runs = train(
            common.BACKENDS[options.backend],
            sees,
            seed=options.seed,
            trainer=partial(output.train, "training loss"),
            # What questions alone tell is soon learned.
            **options.sizes | {"steps": options.steps if sees else math.ceil(options.steps / 4)},
        )
        output.times(runs, options.batch, "answers")
        output.agreement(runs, f"questions {name}")
        shares[name] = {backend: evaluate(run.model, options.seed) for backend, run in runs.items()}
        if sees:
            draw(list(runs.values())[-1].model, options.seed, output.picture)
    output()
    titles = [title for name in shares for title in (name, *[""] * (len(runs) - 1))]
    output("right answers:")
    output.row("", titles)
    output.row("", list(runs) * len(shares))
    for kind in ("all", *KINDS):
        output.row(kind, [x[kind] for values in shares.values() for x in values.values()])
    values = {backend: x["all"] for backend, x in shares["with picture"].items()}
    output.threshold("right answers with the picture", values, at_least=LEARNED)
    return output.close("Questions and answers")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
