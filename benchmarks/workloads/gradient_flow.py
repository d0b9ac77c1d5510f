"""How the gradient of a late loss reaches early steps: the picture of vanishing and exploding
gradients (Hochreiter, 1991; Bengio et al., 1994; Pascanu et al., 2013), measured.

First the norm of the gradient of a loss at step T with respect to the state at step t, against
the distance T - t: RNNs whose recurrent weights are a rotation times the spectral radius, LSTMs and
GRUs by the bias of the gate that keeps the state. Inputs are tiny, so that tanh is in its linear
range and the RNN's answer is known: radius ** distance. The same with the gradient clipped, as a
whole or at every step, and with BPTT truncated.

Then what that means: each of them learns to say at the end of a sequence of noise which of K
symbols came first, input [T, B, K + 1]. What the gradient does not reach is not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedrnn

from . import common
from .common import Run

# Name -> module of torch.nn, and the spectral radius or the bias of the gate that keeps the state.
VARIANTS = {
    "RNN, radius 0.9": ("RNN", 0.9),
    "RNN, radius 1": ("RNN", 1.0),
    "RNN, radius 1.1": ("RNN", 1.1),
    "LSTM, forget bias 0": ("LSTM", 0.0),
    "LSTM, forget bias 1": ("LSTM", 1.0),
    "LSTM, forget bias 5": ("LSTM", 5.0),
    "GRU, update bias 0": ("GRU", 0.0),
    "GRU, update bias 5": ("GRU", 5.0),
}
COLOURS = dict(zip(("RNN", "LSTM", "GRU"), ("Reds", "Blues", "Greens"), strict=True))
SHOWN, EXPLODING = "LSTM, forget bias 5", "RNN, radius 1.1"
SYMBOLS = 4
TRUNCATION = 25
FULL = {"steps": 400, "length": 100, "hidden": 64, "batch": 32}
QUICK = {"steps": 200, "length": 50, "hidden": 64, "batch": 32}


def initialise(module: nn.Module, kind: str, setting: float) -> None:
    """Sets the recurrent weights' spectral radius, or the bias of the forget or update gate."""
    for name, parameter in module.named_parameters():
        if kind == "RNN" and name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter, gain=setting)
        elif kind == "RNN" and name.startswith("bias"):
            nn.init.zeros_(parameter)  # so that tanh stays in its linear range
        elif name.startswith("bias"):
            # Gates i, f, g, o or r, z, n; torch adds bias_ih and bias_hh, so each has a half.
            nn.init.constant_(parameter.chunk(4 if kind == "LSTM" else 3)[1], setting / 2)


def make_cell(variant: str, hidden: int, seed: int) -> nn.Module:
    kind, setting = VARIANTS[variant]
    torch.manual_seed(seed)
    cell = getattr(nn, f"{kind}Cell")(SYMBOLS + 1, hidden)
    initialise(cell, kind, setting)
    return cell


def state_gradients(
    cell: nn.Module,
    length: int,
    seed: int,
    batch: int = 8,
    truncation: int | None = None,
    clip_steps: float | None = None,
    clip: float | None = None,
) -> Tensor:
    """[length] the norm of the gradient of a loss of the last state, by distance: 0, 1, ...

    truncation: steps that the gradient goes back; clip_steps: the largest norm of the gradient that
    one step hands to the one before; clip: the largest norm of the gradient of all weights, as
    clip_grad_norm_ does it. The state of an LSTM is h and c.
    """
    torch.manual_seed(seed)
    inputs = 1e-6 * torch.randn(length, batch, SYMBOLS + 1)
    direction = torch.randn(batch, cell.hidden_size)
    state, states = None, []
    for step, input in enumerate(inputs):
        state = cell(input, state)
        # Copies, so that a gradient is that of later steps only and not of this one's own output.
        parts = [part.clone() for part in (state if isinstance(state, tuple) else (state,))]
        for part in parts:
            part.retain_grad()
            if clip_steps:
                part.register_hook(lambda grad: grad * (clip_steps / grad.norm()).clamp(max=1))
        states.append(parts)
        if truncation and length - 1 - step == truncation:
            parts = [part.detach() for part in parts]
        state = tuple(parts) if isinstance(state, tuple) else parts[0]
    cell.zero_grad()
    (states[-1][0] * direction).sum().backward()
    scale = 1.0
    if clip:
        scale = min(1.0, clip / nn.utils.clip_grad_norm_(cell.parameters(), clip).item())
    norms = [
        sum(part.grad.square().sum() for part in parts if part.grad is not None)
        for parts in reversed(states)
    ]
    return (
        scale * torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in norms]).sqrt()
    )


def measure(backend: str, variant: str, length: int, hidden: int, seed: int, **how) -> Tensor:
    """state_gradients of one backend; raises RuntimeError if anything but the kernels ran."""
    cell = make_cell(variant, hidden, seed)
    if backend == "fusedrnn":
        fusedrnn.replace(cell)
    counts: dict[str, int] = {}
    with common.counted(counts):
        norms = state_gradients(cell, length, seed, **how)
    if "truncation" not in how:  # which leaves most steps without a backward pass
        common.check_counts(backend, counts, length)
    return norms


def rate(norms: Tensor) -> float:
    """The factor a step, from the first distance to the last."""
    return (norms[-1] / norms[0]).item() ** (1 / (len(norms) - 1))


class Recall(nn.Module):
    """Which symbol came first: a decoder on the last output."""

    def __init__(self, variant: str, hidden: int) -> None:
        super().__init__()
        kind, setting = VARIANTS[variant]
        self.rnn = getattr(nn, kind)(SYMBOLS + 1, hidden)
        initialise(self.rnn, kind, setting)
        self.decoder = nn.Linear(hidden, SYMBOLS)

    def forward(self, input: Tensor) -> Tensor:
        """input [T, B, SYMBOLS + 1] -> logits [B, SYMBOLS]."""
        return self.decoder(self.rnn(input)[0][-1])


def sequences(length: int, batch: int) -> tuple[Tensor, Tensor]:
    """Input [T, B, SYMBOLS + 1]: one symbol, then noise in the last feature; target [B]."""
    symbols = torch.randint(SYMBOLS, (batch,))
    input = torch.zeros(length, batch, SYMBOLS + 1)
    input[0] = F.one_hot(symbols, SYMBOLS + 1)
    input[1:, :, -1] = 0.1 * torch.randn(length - 1, batch)
    return input, symbols


def train(
    backends: Sequence[str],
    variant: str,
    *,
    steps: int,
    length: int,
    hidden: int,
    batch: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    """Run.state is the accuracy of every step, on the sequences before they are learned from."""
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        input, target = sequences(length, batch)
        logits = run.model(input)
        run.state = [*(run.state or []), (logits.argmax(-1) == target).float().mean().item()]
        return F.cross_entropy(logits, target)

    model = Recall(variant, hidden)
    return trainer(backends, model, loss, steps=steps, seed=seed, calls=1, learning_rate=2e-3)


def curves(backend: str, length: int, hidden: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """Panel -> line -> norms."""
    measured = partial(measure, backend, length=length, hidden=hidden, seed=seed)
    return {
        "Gradient of the last step's loss": {name: measured(variant=name) for name in VARIANTS},
        f"{EXPLODING}, tamed": {
            "as it is": measured(variant=EXPLODING),
            "weights' gradient clipped at 1": measured(variant=EXPLODING, clip=1.0),
            "clipped at every step": measured(variant=EXPLODING, clip_steps=30.0),
            f"truncated after {TRUNCATION}": measured(variant=EXPLODING, truncation=TRUNCATION),
        },
    }


def draw(
    panels: dict[str, dict[str, Tensor]], accuracies: dict[str, list[float]], path: Path
) -> None:
    """Norm against distance, as it is and tamed, and accuracy against training steps."""
    import matplotlib

    top = 10 * max(norms.max().item() for lines in panels.values() for norms in lines.values())
    colours = {}
    for kind, name in COLOURS.items():
        members = [variant for variant in VARIANTS if VARIANTS[variant][0] == kind]
        for i, variant in enumerate(members):
            colours[variant] = matplotlib.colormaps[name](0.4 + 0.55 * i / (len(members) - 1))
    with common.figure(path, 1, 3, size=(13.5, 4.4)) as (figure, axes):
        for panel, (title, lines) in zip(axes, panels.items(), strict=False):
            for label, norms in lines.items():
                seen = norms.clamp(min=1e-30).where(norms > 0, torch.nan)
                ends = int((norms > 0).sum()) - 1  # truncation
                style = {"marker": "o", "markevery": [ends]} if ends < len(norms) - 1 else {}
                panel.plot(seen, label=label, color=colours.get(label), linewidth=2, **style)
            panel.set_yscale("log")
            panel.set_ylim(1e-8, top)
            panel.set_xlabel("distance from the loss (steps)")
            panel.set_title(title)
        axes[0].set_ylabel("norm of the gradient of the state")
        axes[1].legend(loc="lower right")
        for variant, values in accuracies.items():
            axes[2].plot(common.moving_mean(values), color=colours[variant], linewidth=2)
        axes[2].set_title("Learning which symbol came first")
        axes[2].set_xlabel("training step")
        axes[2].set_ylabel("accuracy")
        axes[2].set_ylim(0, 1.05)
        for panel in axes:
            panel.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.Parser("gradient_flow", __doc__, FULL, QUICK)
    options = parser.options(arguments)
    if options.length < 2:
        parser.error("argument --length: expected at least 2 steps, got 1")
    output = common.Output("gradient_flow", options)
    backends = common.BACKENDS[options.backend]
    place = {name: options.sizes[name] for name in ("length", "hidden")}
    measured = {backend: curves(backend, seed=options.seed, **place) for backend in backends}
    output("Factor a step by which the gradient of the state shrinks or grows; RNN: its radius")
    output.row("", backends)
    first = next(iter(measured[backends[0]]))
    for variant in VARIANTS:
        output.row(variant, [rate(measured[backend][first][variant]) for backend in backends])
    radii = {name: radius for name, (kind, radius) in VARIANTS.items() if kind == "RNN"}
    errors = {
        backend: max(abs(rate(measured[backend][first][name]) - x) for name, x in radii.items())
        for backend in backends
    }
    output.threshold("largest error of an RNN's factor", errors, at_most=0.01)
    output(
        f"\nWhich of {SYMBOLS} symbols came first, {options.length} steps ago: accuracy, ms a step"
    )
    titles = [title for name in backends for title in (name, "ms")]
    output.row("", titles)
    trained = {}
    with common.progress(options.steps * len(backends) * len(VARIANTS)) as bar:
        for variant in VARIANTS:
            bar.title(variant)
            trainer = partial(common.train, on_step=bar.step)
            runs = train(backends, variant, **options.sizes, seed=options.seed, trainer=trainer)
            trained[variant] = runs
            cells = []
            for run in runs.values():
                cells += [f"{fmean(run.state[-50:]):.4f}", f"{1e3 * median(run.seconds):.1f}"]
            output.row(variant, cells)
            if variant != SHOWN:
                output.training(runs, variant)
    output(f"\n{SHOWN}:")
    output.agreement(trained[SHOWN], SHOWN)
    reached = {backend: fmean(run.state[-50:]) for backend, run in trained[SHOWN].items()}
    output.threshold("accuracy", reached, at_least=0.95)
    accuracies = {variant: runs[backends[-1]].state for variant, runs in trained.items()}
    draw(measured[backends[-1]], accuracies, output.picture)
    return output.close("Gradient against distance")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
