"""One layer at the level of functional.py, for the kernels' tests: inputs and comparison. No tests."""

import torch

LAYER_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def layer_inputs(cell, T, B, I, H, D, dtype, seed=0):
    """(input, initial states, weights) of one layer, as functional's _layer takes them, all leaves."""
    torch.manual_seed(seed)
    rows = {"lstm": 4, "gru": 3}.get(cell, 1) * H
    weights = []
    for _ in range(D):
        weights += [
            torch.randn(rows, I),
            torch.randn(rows, H) / H**0.5,
            torch.randn(rows),
            torch.randn(rows),
        ]
    states = [torch.randn(D, B, H) for _ in range(1 + (cell == "lstm"))]
    leaf = lambda t: t.to(dtype).requires_grad_()  # noqa: E731
    return leaf(torch.randn(T, B, I)), tuple(map(leaf, states)), tuple(map(leaf, weights))


def relative_error(a, b):
    """The largest difference, relative to the largest element of b or to 1."""
    if b.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
