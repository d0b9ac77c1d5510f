"""What of the kernels is to be seen from outside: torch.profiler's names and the logger's lines."""

import logging

import pytest
import torch
from torch import nn

import fusedrnn


@pytest.mark.parametrize("profile", [torch.profiler.profile, torch.autograd.profiler.profile])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_profiler_shows_forward_and_backward_by_name(name, profile):
    layer, cell = getattr(fusedrnn, name)(3, 4), getattr(fusedrnn, f"{name}Cell")(3, 4)
    with profile() as recorded:
        layer(torch.randn(5, 2, 3))[0].sum().backward()
        with torch.no_grad():
            layer(torch.randn(5, 2, 3))
            cell(torch.randn(2, 3))
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert counts[f"fusedrnn::{name.lower()}_forward"] == 3
    assert counts[f"fusedrnn::{name.lower()}_backward"] == 1


def test_profiled_results_are_the_same():
    layer, input = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = layer(input)[0]
    with torch.profiler.profile():
        actual = layer(input)[0]
    assert torch.equal(actual, expected)


def test_a_call_left_to_torch_is_logged_with_the_reason(caplog):
    caplog.set_level(logging.DEBUG, "fusedrnn")
    fusedrnn.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert caplog.messages == []  # by the kernels
    fusedrnn.LSTM(3, 4, device="meta")(torch.empty(5, 2, 3, device="meta"))
    (message,) = caplog.messages
    assert message.startswith("LSTM: torch.nn: the tensors are on meta")


def test_a_call_left_to_the_reference_is_logged(caplog):
    caplog.set_level(logging.DEBUG, "fusedrnn")
    cell = fusedrnn.GRUCell(3, 4)
    torch.func.vmap(cell)(torch.randn(2, 5, 3))
    assert caplog.messages == ["gru layer: not torch's, as torch.func or forward-mode AD is active"]


def test_nothing_is_logged_unless_debug_is_asked_for(caplog):
    caplog.set_level(logging.INFO, "fusedrnn")
    fusedrnn.LSTM(3, 4, proj_size=2)(torch.randn(5, 2, 3))
    nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert caplog.messages == []
