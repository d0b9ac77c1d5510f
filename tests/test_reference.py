"""reference.py, which the kernels are held against, is torch.nn's own arithmetic."""

import pytest
import torch
from layers import LAYER_CELLS
from torch import nn

from fusedrnn import reference

MODULES = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch_nn_in_float64(cell, bidirectional, bias):
    torch.manual_seed(0)
    module = MODULES[cell](5, 7, bidirectional=bidirectional, bias=bias).double()
    x = torch.randn(6, 3, 5).double().requires_grad_()
    directions = 1 + bidirectional
    states = [torch.randn(directions, 3, 7).double() for _ in range(1 + (cell == "lstm"))]
    output, finals = module(x, tuple(states) if cell == "lstm" else states[0])
    expected = [output, *finals] if cell == "lstm" else [output, finals]

    flat = list(module._flat_weights)
    weights = (
        flat
        if bias
        else [w for d in range(directions) for w in (*flat[2 * d : 2 * d + 2], None, None)]
    )
    ours = reference.scan(cell, x, tuple(states), weights)

    leaves = [x, *module.parameters()]
    grads = [torch.randn_like(r) for r in expected]
    for a, b in zip(
        [*ours, *torch.autograd.grad(ours, leaves, grads)],
        [*expected, *torch.autograd.grad(expected, leaves, grads)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
