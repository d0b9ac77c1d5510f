"""A moving shape: many to many and many to one. A CNN reads every frame, an LSTM the frames.

Data: clips of a shape that moves a pixel a frame to the right, left, down or up, turns at random
and at the walls. For each frame: which way it moves, which no single frame shows. For the clip:
whether it turned once, twice or more often, which only a state that counts can say (after Donahue
et al., 2015). Input: [T, B, 1, 16, 16]; output: logits [T, B, ways] and, by the last state,
[B, counts].
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

WAYS = ("right", "left", "down", "up")
STEPS = torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])  # x, y of each way
SIDE, RADIUS = 16, 2.5
TURNING = 0.06  # the chance of a turn at a frame
COUNTS = ("1 turn or none", "2 turns", "3 or more")  # about as frequent, in 16 frames
FULL = {"steps": 1500, "hidden": 64, "batch": 16, "length": 16}
QUICK = {"steps": 800, "hidden": 64, "batch": 16, "length": 16}
LEARNED = {"frames": 0.95, "clips": 0.9}


def make_clips(length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [T, B, 1, SIDE, SIDE], the way since the frame before [T, B] (-1 in the first frame),
    an index into COUNTS [B].
    """
    shape = torch.randint(len(scenes.SHAPES), (batch,))
    way = torch.randint(len(WAYS), (batch,))
    low, high = RADIUS, SIDE - RADIUS
    place = low + torch.rand(batch, 2) * (high - low)
    frames, ways, turns = [], [], torch.zeros(batch, dtype=torch.long)
    for step in range(length):
        if step:
            # To a side, at random: x from y or y from x. Then back, where a wall is in the way.
            aside = (way < 2) * 2 + torch.randint(2, (batch,))
            # A turn counts once the next frame shows it, and two frames have no turn yet.
            now = torch.where((torch.rand(batch) < TURNING) & (step > 1), aside, way)
            ahead = place + STEPS[now]
            now = torch.where(((ahead < low) | (ahead > high)).any(1), now ^ 1, now)
            turns += (now != way) & (step > 1)
            way = now
            place = place + STEPS[way]
        ways.append(way if step else torch.full_like(way, -1))
        drawn = scenes.coverage(shape, *place.t(), torch.full((batch,), RADIUS), SIDE)
        frames.append((drawn + 0.1 * torch.randn(batch, SIDE, SIDE))[:, None])
    return torch.stack(frames), torch.stack(ways), turns.clamp(1, len(COUNTS)) - 1


class VideoModel(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cnn = scenes.CNN(1, hidden, SIDE)
        self.lstm = nn.LSTM(hidden, hidden, num_layers=2)  # one sees turns, one counts them
        self.way = nn.Linear(hidden, len(WAYS))
        self.count = nn.Linear(hidden, len(COUNTS))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """frames [T, B, 1, SIDE, SIDE] -> logits [T, B, ways], [B, counts]."""
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        output, (h_n, _) = self.lstm(features)
        return self.way(output), self.count(h_n[-1])


def train(
    backends: Sequence[str],
    *,
    steps: int,
    hidden: int,
    batch: int,
    length: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        frames, ways, turns = make_clips(length, batch)
        way, count = run.model(frames)
        each = F.cross_entropy(way.flatten(0, 1), ways.flatten(), ignore_index=-1)
        return each + F.cross_entropy(count, turns)

    model = VideoModel(hidden)
    return trainer(backends, model, loss, steps=steps, seed=seed, calls=2, learning_rate=1e-2)


@torch.no_grad()
def evaluate(model: nn.Module, length: int, seed: int, count: int = 500) -> dict[str, float]:
    """Accuracy over frames, the first aside, and over clips; the share of the commonest count."""
    torch.manual_seed(seed + 2**31)
    frames, ways, turns = make_clips(length, count)
    way, counted = model(frames)
    return {
        "frames": (way.argmax(-1) == ways)[1:].float().mean().item(),
        "commonest count": (turns.bincount().max() / count).item(),
        "clips": (counted.argmax(-1) == turns).float().mean().item(),
    }


@torch.no_grad()
def draw(model: nn.Module, length: int, seed: int, path: Path) -> None:
    """Clips of the test, every second frame, and what the model says of them (red: wrong)."""
    torch.manual_seed(seed + 2**31)
    frames, ways, turns = make_clips(length, 4)
    way, counted = (logits.argmax(-1) for logits in model(frames))
    shown = range(1, length, 2)
    with common.figure(path, 4, len(shown), size=(1.1 * len(shown), 6.2)) as (figure, grid):
        for clip, row in enumerate(grid):
            for axes, step in zip(row, shown, strict=True):
                axes.imshow(frames[step, clip, 0], cmap="gray", vmin=0, vmax=1)
                axes.set_axis_off()
                right = way[step, clip] == ways[step, clip]
                axes.set_title(WAYS[way[step, clip]], fontsize=9, color="black" if right else "red")
            right = counted[clip] == turns[clip]
            colour = "black" if right else "red"
            axes = row[0]
            axes.text(
                -0.2, 0.5, COUNTS[counted[clip]], color=colour, rotation=90,
                ha="right", va="center", transform=axes.transAxes,
            )  # fmt: skip
        figure.suptitle("Every second frame: which way it moves; at the left: how often it turned")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.Parser("video", __doc__, FULL, QUICK)
    options = parser.options(arguments)
    if options.length < 4:
        parser.error(f"argument --length: expected at least 4 frames, got {options.length}")
    output = common.Output("video", options)
    output(
        f"CNN and LSTM, {options.hidden} units, batch {options.batch}, clips of {options.length} "
        "frames"
    )
    runs = train(
        common.BACKENDS[options.backend],
        seed=options.seed,
        trainer=partial(output.train, "training loss"),
        **options.sizes,
    )
    output.times(runs, options.batch * options.length, "frames")
    output.agreement(runs)
    accuracies = {
        backend: evaluate(run.model, options.length, options.seed) for backend, run in runs.items()
    }
    chance = accuracies[next(iter(runs))]["commonest count"]
    output(f"always the commonest count: {chance:.4f} of clips")
    for name, limit in LEARNED.items():
        values = {backend: accuracy[name] for backend, accuracy in accuracies.items()}
        output.threshold(f"accuracy of {name}", values, at_least=limit)
    draw(list(runs.values())[-1].model, options.length, options.seed, output.picture)
    return output.close("Clips and what is said of them")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
