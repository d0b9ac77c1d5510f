"""Drawn scenes with a known description, for the workloads that look at pictures: one object or two
of a shape, colour and size, side by side or one above the other; and a small CNN that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.9, 0.9, 0.1),
}
SIDE = 24  # pixels
KINDS = len(SHAPES) * len(SIZES) * len(COLOURS)
HELD_OUT = 7  # every seventh pair of objects, in either order, is for the test


@dataclass
class Thing:
    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass
class Scene:
    """The first thing is on the left, or above."""

    things: list[Thing]
    above: bool

    def __str__(self) -> str:
        return (" above " if self.above else " left of ").join(map(str, self.things))


def make_thing(kind: int) -> Thing:
    kind, shape = divmod(kind, len(SHAPES))
    colour, size = divmod(kind, len(SIZES))
    return Thing(SHAPES[shape], list(COLOURS)[colour], SIZES[size])


def make_scenes(count: int, held_out: bool) -> list[Scene]:
    """Scenes drawn at random, of pairs of objects that are held out or of those that are not.

    One in four of the latter has its first object only.
    """
    scenes: list[Scene] = []
    while len(scenes) < count:
        first, second = torch.randint(KINDS, (2,)).tolist()
        if ((first + second) % HELD_OUT == 0) != held_out:
            continue
        things = [make_thing(first), make_thing(second)]
        alone, above = (torch.rand(2) < torch.tensor([0.25, 0.5])).tolist()
        alone = alone and not held_out
        scenes.append(Scene(things[: 2 - alone], above and not alone))
    return scenes


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor, side: int = SIDE) -> Tensor:
    """[N] each -> [N, side, side], how much of each pixel the shape covers, about: 0 to 1."""
    grid = torch.arange(side) + 0.5
    dx = (grid[None, None, :] - x[:, None, None]).abs()
    dy = grid[None, :, None] - y[:, None, None]
    radius = radius[:, None, None]
    outside = torch.stack(  # the distance from the edge, negative inside
        [
            (dx.square() + dy.square()).sqrt() - radius,
            torch.maximum(dx, dy.abs()) - 0.85 * radius,
            torch.maximum(dy - 0.8 * radius, (2 * dx - dy - radius) / 5**0.5),
        ]
    )
    return (0.5 - outside[shape, torch.arange(len(shape))]).clamp(0, 1)


def render(scenes: list[Scene]) -> Tensor:
    """[N, 3, SIDE, SIDE] in 0..1: the things at random places of their halves, and some noise."""
    count = len(scenes)
    pictures = 0.1 * torch.rand(count, 3, SIDE, SIDE)
    above = torch.tensor([scene.above for scene in scenes])
    for place in (0, 1):
        # One that is not there is drawn outside of the picture.
        things = [scene.things[place] if place < len(scene.things) else None for scene in scenes]
        shape = torch.tensor([SHAPES.index(thing.shape) if thing else 0 for thing in things])
        radius = torch.tensor([5.0 if thing and thing.size == "large" else 3.5 for thing in things])
        colour = torch.tensor([COLOURS[thing.colour] if thing else (0, 0, 0) for thing in things])
        along = SIDE / 4 + place * SIDE / 2 + (torch.rand(count) - 0.5) * 2
        across = SIDE / 2 + (torch.rand(count) - 0.5) * 8
        along[torch.tensor([thing is None for thing in things])] = -SIDE
        x, y = torch.where(above, across, along), torch.where(above, along, across)
        covered = coverage(shape, x, y, radius)[:, None]
        pictures = torch.lerp(pictures, colour[:, :, None, None], covered)
    return pictures


class CNN(nn.Module):
    """A picture -> its feature vector."""

    def __init__(self, channels: int, features: int, side: int = SIDE) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (side // 4) ** 2, features),
            nn.ReLU(),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, channels, side, side] -> [N, features]."""
        return self.layers(pictures)


class Vocabulary:
    """Words as numbers; PAD, START and END are the first three."""

    PAD, START, END = range(3)

    def __init__(self, words: str) -> None:
        self.words = ["<pad>", "<start>", "<end>", *dict.fromkeys(words.split())]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, sentences: list[str]) -> Tensor:
        """[T, B] the words of each, END, and PAD up to the longest."""
        columns = [
            torch.tensor([*(self.index[word] for word in sentence.split()), self.END])
            for sentence in sentences
        ]
        return nn.utils.rnn.pad_sequence(columns, padding_value=self.PAD)

    def decode(self, tokens: Tensor) -> list[str]:
        """[T, B] -> what is before each one's END."""
        sentences = []
        for column in tokens.t().tolist():
            end = column.index(self.END) if self.END in column else len(column)
            sentences.append(" ".join(self.words[token] for token in column[:end]))
        return sentences


def after_start(target: Tensor) -> Tensor:
    """[T, B] what a decoder reads to write the target: START, and the target a step later."""
    start = torch.full_like(target[:1], Vocabulary.START)
    return torch.cat([start, target[:-1]])
