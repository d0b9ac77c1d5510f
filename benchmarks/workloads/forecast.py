"""A chaotic series, foretold by feeding the forecast back: autoregressive, one to many.

Data: the Mackey-Glass equation (Mackey and Glass, 1977) with delay 17,
dx/dt = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x, in float64 by Runge-Kutta's fourth order, a
sample every 2 units of time, the last fifth held out. Input [T, B, 1], the next value as target.

A GRU with a decoder that foretells the change from sample to sample, trained in two ways: one
step ahead (teacher forcing), and on its own outputs too, where a window's second part is foretold
without its values. Tested by the error against the horizon, as a share of the series' standard
deviation (NRMSE). Chaos bounds what can be had: the smallest error grows from sample to sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import common
from .common import Run

DELAY, INTERVAL, SUBSTEPS = 17, 2, 20  # units of time; steps of the solver a unit
AHEAD = {"one step ahead": 0, "on its own outputs": 20}  # samples of a window foretold in a row
SETTLE = 20  # samples of a window whose forecasts do not count: the delay is not in sight yet
WARM_UP, HORIZON = 100, 200  # samples, in the test
AT = 42  # the horizon of the threshold: 84 units of time, the customary one
FULL = {"steps": 1000, "hidden": 64, "batch": 16, "length": 100}
QUICK = {"steps": 600, "hidden": 64, "batch": 16, "length": 100}
LEARNED = 0.2


def mackey_glass(samples: int, warm_up: int = 500) -> Tensor:
    """[samples] float64, after `warm_up` of them that forget the start."""
    lag = DELAY * SUBSTEPS
    step = 1 / SUBSTEPS

    def slope(x: float, delayed: float) -> float:
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

    values = [1.2] * (lag + 1)
    for i in range((samples + warm_up) * INTERVAL * SUBSTEPS):
        x, start, end = values[-1], values[i], values[i + 1]
        middle = (start + end) / 2
        k1 = slope(x, start)
        k2 = slope(x + step / 2 * k1, middle)
        k3 = slope(x + step / 2 * k2, middle)
        k4 = slope(x + step * k3, end)
        values.append(x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.tensor(values[:: INTERVAL * SUBSTEPS][-samples:], dtype=torch.float64)


class Forecaster(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, input: Tensor, ahead: int = 0) -> Tensor:
        """input [T, B, 1] -> the next value after each, and `ahead` more: [T + ahead, B, 1]."""
        output, h_n = self.rnn(input)
        forecasts = [input + self.linear(output)]
        for _ in range(ahead):
            last = forecasts[-1][-1:]
            output, h_n = self.rnn(last, h_n)
            forecasts.append(last + self.linear(output))
        return torch.cat(forecasts)


def windows(series: Tensor, length: int, batch: int) -> Tensor:
    """[length, B, 1] pieces of the series from anywhere."""
    starts = torch.randint(len(series) - length + 1, (batch,))
    return series[starts + torch.arange(length)[:, None]][..., None]


def train(
    backends: Sequence[str],
    series: Tensor,
    ahead: int,
    *,
    steps: int,
    hidden: int,
    batch: int,
    length: int,
    seed: int,
    trainer: Callable[..., dict[str, Run]] = common.train,
) -> dict[str, Run]:
    """Windows of `length` values, the last `ahead` of which the model never sees."""
    torch.manual_seed(seed)

    def loss(run: Run, step: int) -> Tensor:
        window = windows(series, length + 1, batch)
        forecasts = run.model(window[: length - ahead], ahead)
        return F.mse_loss(forecasts[SETTLE:], window[1 + SETTLE :])

    return trainer(
        backends,
        Forecaster(hidden),
        loss,
        steps=steps,
        seed=seed,
        calls=1 + ahead,
        learning_rate=5e-3,
    )


@torch.no_grad()
def forecast(model: nn.Module, series: Tensor, seed: int, count: int = 200) -> tuple:
    """`count` windows: what was so [HORIZON, count], and what the model foretold."""
    torch.manual_seed(seed + 2**31)
    window = windows(series, WARM_UP + HORIZON, count)
    forecasts = model(window[:WARM_UP], HORIZON - 1)[WARM_UP - 1 :]
    return window[WARM_UP:, :, 0], forecasts[:, :, 0]


def nrmse(truth: Tensor, forecasts: Tensor, series: Tensor) -> Tensor:
    """[HORIZON] the root of the mean squared error, as a share of the standard deviation."""
    return (truth - forecasts).square().mean(1).sqrt() / series.std()


def draw(foretold: dict[str, tuple[Tensor, Tensor]], errors: dict[str, Tensor], path: Path) -> None:
    """One window and its forecasts, and the error against the horizon."""
    colours = dict(zip(AHEAD, ("tab:blue", "tab:red"), strict=True))
    with common.figure(path, 1, 2, size=(11, 4)) as (_, (left, right)):
        time = INTERVAL * torch.arange(1, HORIZON + 1)
        for name, (truth, forecasts) in foretold.items():
            if name == next(iter(foretold)):
                left.plot(time, truth[:, 0], color="black", linewidth=3, alpha=0.3, label="truth")
            left.plot(time, forecasts[:, 0], color=colours[name], label=name)
            right.plot(time, errors[name], color=colours[name], label=name)
        right.axhline(1, color="black", linestyle=":", label="the mean as forecast")
        right.axvline(AT * INTERVAL, color="black", alpha=0.3)
        right.set_yscale("log")
        right.set_ylabel("error, as a share of the standard deviation")
        right.set_title("200 windows: error against horizon")
        right.legend(title="trained")
        left.set_ylabel("x (mean 0, standard deviation 1)")
        left.set_ylim(-3.2, 3.2)
        left.set_title("Mackey-Glass series, one window held out")
        left.legend(ncols=3, loc="upper center")
        for axes in (left, right):
            axes.set_xlabel("time since the last value seen")
            axes.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = common.Parser("forecast", __doc__, FULL, QUICK)
    options = parser.options(arguments)
    if options.length <= SETTLE + max(AHEAD.values()):
        parser.error(f"argument --length: expected more than {SETTLE + max(AHEAD.values())}")
    output = common.Output("forecast", options)
    series = mackey_glass(10_000)
    series = ((series - series.mean()) / series.std()).float()
    training, held_out = series[:8000], series[8000:]
    output(f"GRU, {options.hidden} units, batch {options.batch}, windows of {options.length}")
    foretold, errors, at = {}, {}, {}
    for name, ahead in AHEAD.items():
        output(f"\ntrained {name}" + f", {ahead} samples in a row" * bool(ahead))
        runs = train(
            common.BACKENDS[options.backend],
            training,
            ahead,
            seed=options.seed,
            trainer=partial(output.train, "mean squared error"),
            **options.sizes,
        )
        output.times(runs)
        output.agreement(runs, f"trained {name}")
        at[name] = {}
        table = []
        for backend, run in runs.items():
            foretold[name] = forecast(run.model, held_out, options.seed)
            errors[name] = nrmse(*foretold[name], series)
            at[name][backend] = errors[name][AT - 1].item()
            table.append(errors[name])
        for horizon in (1, 10, AT, 100, HORIZON):
            output.row(
                f"NRMSE {horizon} samples on", [error[horizon - 1].item() for error in table]
            )
    output()
    for name, values in at.items():
        output.threshold(f"NRMSE {AT} samples on, trained {name}", values, at_most=LEARNED)
    draw(foretold, errors, output.picture)
    return output.close("Error against horizon")


if __name__ == "__main__":
    raise SystemExit(common.exit_code(main()))
