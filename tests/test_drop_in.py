"""Every option of torch.nn's RNN modules in every combination: our module against torch.nn's, in
outputs, final states and all gradients, with the kernels' counters rising."""

import itertools

import pytest
import torch
from helpers import LAYERS, assert_same, pair, ran, run, states
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

T, B, I, H, P = 5, 4, 3, 6, 2  # noqa: E741
FORMS = ("padded", "strided", "unbatched", "packed", "packed, any order")
KINDS = [*itertools.product(LAYERS, [0]), ("LSTM", P)]


class Packed(nn.Module):
    """A module as a function of padded input, its PackedSequence made and taken apart inside."""

    def __init__(self, module, lengths, enforce_sorted):
        super().__init__()
        self.module, self.lengths, self.enforce_sorted = module, lengths, enforce_sorted

    def forward(self, input, hx=None):
        packed = pack_padded_sequence(
            input, self.lengths, self.module.batch_first, self.enforce_sorted
        )
        output, state = self.module(packed, hx)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        return output.data, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "proj_size"), KINDS)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_every_combination(kind, proj_size, form, layers, dtype):
    flags = itertools.product((False, True), repeat=4)
    for (bias, bidirectional, batch_first, given), dropout in itertools.product(
        flags, (0.0, 0.4) if layers > 1 else (0.0,)
    ):
        options = {"proj_size": proj_size} if proj_size else {}
        modules = pair(
            kind,
            I,
            H,
            num_layers=layers,
            bias=bias,
            batch_first=batch_first,
            bidirectional=bidirectional,
            dropout=dropout,
            dtype=dtype,
            **options,
        )
        generator = torch.Generator().manual_seed(1)
        shape = (T, I) if form == "unbatched" else (B, T, I) if batch_first else (T, B, I)
        input = torch.randn(shape, generator=generator, dtype=dtype)
        if form == "strided":  # run() clones, and a clone keeps these strides
            input = torch.randn(shape[::-1], generator=generator, dtype=dtype).permute(2, 1, 0)
            assert not input.clone().is_contiguous()
        if form.startswith("packed"):
            lengths = torch.tensor([5, 4, 4, 1] if form == "packed" else [4, 1, 5, 4])
            modules = [Packed(m, lengths, form == "packed") for m in modules]
        hx = None
        if given:
            directions = (1 + bidirectional) * layers
            batch = () if form == "unbatched" else (B,)
            hx = states(kind, directions, *batch, H, dtype=dtype)
            if proj_size:
                hx = (hx[0][..., :proj_size].contiguous(), hx[1])
        theirs, ours = modules
        with ran("kernel_forward", "kernel_backward"):
            actual = run(ours, input, hx)
        assert_same(actual, run(theirs, input, hx), dtype)
