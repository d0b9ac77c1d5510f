"""Per-sample gradients of the weights: vmap(grad) against loops over the samples, in turns:
`python -m benchmarks.bench_samples`. float32, one layer, B = 32, T = 50, H = 128.

The loops call autograd once a sample, with fusedrnn's module and with torch.nn's, or torch.func's
grad once a sample with torch.nn's, which is what vmap(grad) stands for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .common import IMPLEMENTATIONS, TableParser, commit, interleave, machine, publish, threads

BATCH, STEPS, SIZE = 32, 50, 128
SECONDS = 30  # a line of the table, at most


def implementations(cell: str) -> dict[str, Callable[[], list[Tensor]]]:
    """What each computes is the gradients [B, ...] of all weights, in their order."""
    torch.manual_seed(0)
    modules = {name: getattr(source, cell)(SIZE, SIZE) for name, source in IMPLEMENTATIONS.items()}
    modules["fusedrnn"].load_state_dict(modules["torch.nn"].state_dict())
    weights = {n: p.detach() for n, p in modules["torch.nn"].named_parameters()}
    inputs = torch.randn(BATCH, STEPS, 1, SIZE)

    def gradients(module: nn.Module) -> Callable[..., dict[str, Tensor]]:
        return grad(lambda w, x: functional_call(module, w, (x,))[0].square().sum())

    def at_once() -> list[Tensor]:
        found = vmap(gradients(modules["fusedrnn"]), (None, 0))(weights, inputs)
        return list(found.values())

    def stacked(each: list[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.stack(g) for g in zip(*each, strict=True)]

    def loop(name: str) -> list[Tensor]:
        module, parameters = modules[name], list(modules[name].parameters())
        losses = (module(x)[0].square().sum() for x in inputs)
        return stacked([torch.autograd.grad(loss, parameters) for loss in losses])

    def functional_loop() -> list[Tensor]:
        one = gradients(modules["torch.nn"])
        return stacked([tuple(one(weights, x).values()) for x in inputs])

    return {
        "fusedrnn": at_once,
        "loop of fusedrnn": lambda: loop("fusedrnn"),
        "loop of torch.nn": lambda: loop("torch.nn"),
        "loop of torch.nn, torch.func": functional_loop,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = TableParser("python -m benchmarks.bench_samples", __doc__, rounds=7)
    options = parser.options(arguments)
    lines = [f"{machine()}, commit {commit()}", ""]
    for cell in options.cells:
        calls = implementations(cell)
        if len(lines) == 2:
            names = list(calls)
            lines += [f"| ms | threads | vmap(grad) | {' | '.join(names[1:])} |", "|---" * 6 + "|"]
        expected = calls["loop of torch.nn"]()
        for a, b in zip(calls["fusedrnn"](), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
        for count in options.threads:
            with threads(count):
                timing = interleave(calls, options.rounds, SECONDS)
            times = [f"{timing.ms('fusedrnn'):.1f}"]
            times += [f"{timing.ms(n):.1f} ({timing.speedup(n):.1f}x)" for n in names[1:]]
            lines.append(f"| {cell} | {count} | {' | '.join(times)} |")
            print(lines[-1], file=sys.stderr)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
