"""One layer as functional.py takes it: inputs and comparison, for the kernels' tests. No tests."""

import torch

LAYER_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def layer_inputs(cell, T, B, I, H, D, dtype, seed=0):  # noqa: E741
    """(input, initial states, weights) of one layer, all leaves."""
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


def in_dtype(inputs, dtype):
    """What layer_inputs gave, as other leaves of a dtype."""
    x, initial, weights = inputs
    leaf = lambda t: t.detach().to(dtype).requires_grad_()  # noqa: E731
    return leaf(x), tuple(map(leaf, initial)), tuple(map(leaf, weights))


def relative_error(a, b):
    """The largest difference, relative to the largest element of b or to 1."""
    if b.numel() == 0:
        assert a.shape == b.shape
        return 0.0
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
