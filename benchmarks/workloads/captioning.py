"""Pictures to sentences: one to many. A small CNN reads a drawn scene, a GRU says what is in it.

Data: scenes of one or two objects, drawn by scenes.py, and their captions, such as "a small red
circle left of a large blue square"; the pairs of objects of the test are in no training scene.

The picture's feature vector comes into the recurrence in three ways that are compared: as the
first state h0 (Vinyals et al., 2015), as an extra term of every step (Mao et al., 2015; here a part
of the input, whose weights make that term), and as both. A LayerNorm scales it first: a GRU's own
states stay within -1 and 1, and an h0 far outside, as a bare CNN learns to make it, saturates its
gates, after which little is learned.

Input: START and the caption [T, B], a picture [B, 3, 24, 24]; target: the caption and END. Tested
on its own words, the likeliest one at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import common, scenes
from .common import Run
from .scenes import Scene, Vocabulary

WORDS = Vocabulary(" ".join(["a left of above", *scenes.SIZES, *scenes.COLOURS, *scenes.SHAPES]))
LONGEST = 11  # words and END
INJECTIONS = {"h0": (True, False), "every step": (False, True), "both": (True, True)}
FULL = {"steps": 900, "hidden": 96, "batch": 64}
QUICK = {"steps": 600, "hidden": 96, "batch": 48}
LEARNED = 0.9


class Captioner(nn.Module):
    def __init__(self, hidden: int, as_h0: bool, every_step: bool) -> None:
        super().__init__()
        self.as_h0, self.every_step = as_h0, every_step
        self.cnn = nn.Sequential(scenes.CNN(3, hidden), nn.LayerNorm(hidden))
        self.embedding = nn.Embedding(len(WORDS), hidden)
        self.rnn = nn.GRU(hidden + hidden * every_step, hidden)
        self.linear = nn.Linear(hidden, len(WORDS))

    def forward(self, words: Tensor, features: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """words [T, B], features [B, H] -> logits [T, B, words], h [1, B, H]."""
        input = self.embedding(words)
        if self.every_step:
            input = torch.cat([input, features.expand(len(words), -1, -1)], -1)
        output, h = self.rnn(input, h)
        return self.linear(output), h

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """The pictures' features and the first state."""
        features = self.cnn(pictures)
        return features, features[None].contiguous() if self.as_h0 else None


def train(
    backends: Sequence[str],
    injection: str,
    *,
    steps: int,
    hidden: int,
    batch: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        drawn = scenes.make_scenes(batch, held_out=False)
        target = WORDS.encode(list(map(str, drawn)))
        features, h = run.model.look(scenes.render(drawn))
        logits, _ = run.model(scenes.after_start(target), features, h)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=WORDS.PAD)

    model = Captioner(hidden, *INJECTIONS[injection])
    return trainer(backends, model, loss, steps=steps, seed=seed, calls=1, learning_rate=5e-3)


@torch.no_grad()
def describe(model: nn.Module, pictures: Tensor) -> list[str]:
    """A caption of each picture, word by word until END."""
    features, h = model.look(pictures)
    word = torch.full((1, len(pictures)), WORDS.START)
    words = []
    for _ in range(LONGEST):
        logits, h = model(word, features, h)
        word = logits.argmax(-1)
        words.append(word)
    return WORDS.decode(torch.cat(words))


def unseen_scenes(seed: int, count: int) -> tuple[list[Scene], Tensor]:
    torch.manual_seed(seed + 2**31)
    drawn = scenes.make_scenes(count, held_out=True)
    return drawn, scenes.render(drawn)


def evaluate(model: nn.Module, seed: int, count: int = 500) -> float:
    """The share of captions without a wrong word."""
    drawn, pictures = unseen_scenes(seed, count)
    captions = describe(model, pictures)
    right = [caption == str(scene) for caption, scene in zip(captions, drawn, strict=True)]
    return sum(right) / count


def draw(model: nn.Module, seed: int, path: Path) -> None:
    """Scenes of the test and what the model says of them, in red where it is wrong."""
    drawn, pictures = unseen_scenes(seed, 12)
    captions = describe(model, pictures)
    with common.figure(path, 3, 4, size=(10, 7.6)) as (figure, grid):
        for axes, scene, picture, caption in zip(grid.flat, drawn, pictures, captions, strict=True):
            axes.imshow(picture.permute(1, 2, 0))
            axes.set_axis_off()
            text = caption.replace(" left of", "\nleft of").replace(" above", "\nabove")
            axes.set_title(text, fontsize=9, color="black" if caption == str(scene) else "red")
        figure.suptitle("Scenes of held-out pairs, and their captions (red: wrong)")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = common.Parser("captioning", __doc__, FULL, QUICK).options(arguments)
    output = common.Output("captioning", options)
    output(f"CNN and GRU, {options.hidden} units, batch {options.batch}")
    exact = {}
    for injection in INJECTIONS:
        output(f"\nthe picture comes in as {injection}")
        runs = train(
            common.BACKENDS[options.backend],
            injection,
            seed=options.seed,
            trainer=partial(output.train, "training loss"),
            **options.sizes,
        )
        exact[injection] = {name: evaluate(run.model, options.seed) for name, run in runs.items()}
        output.times(runs, options.batch, "captions")
        output.agreement(runs, injection)
    output()
    for injection, values in exact.items():
        output.threshold(f"exact captions, {injection}", values, at_least=LEARNED)
    draw(list(runs.values())[-1].model, options.seed, output.picture)
    return output.close("Captions")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
