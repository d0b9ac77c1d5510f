"""The kernels' forward and backward against reference.py and torch.nn, at ugly sizes.

One layer at a time, through functional.py; modules have their own tests. test_isa.py runs this file
again under every instruction set that the machine has.
"""

import os

import pytest
import torch
from helpers import ran
from layers import LAYER_CELLS, in_dtype, layer_inputs, relative_error

from benchmarks import limits
from benchmarks.common import threads as num_threads
from fusedrnn import functional, ops, reference

# T, B, I, H, D: below, at and above the vector widths (2 to 16 lanes) and tile heights (1 to 8
# rows).
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 4, 3, 17, 2),
    (2, 1, 2, 2, 1),
    (5, 3, 4, 7, 1),
    (3, 2, 3, 15, 2),
    (4, 9, 6, 16, 1),
    (6, 13, 5, 33, 2),
    (7, 2, 3, 64, 2),
    (3, 29, 8, 129, 1),
    (9, 1, 4, 151, 1),
    (40, 5, 3, 24, 1),
    (2, 7, 37, 129, 2),  # weights not packed, whole and partial vectors along k
    (4, 3, 17, 33, 1),
    (37, 4, 300, 387, 1),  # factors of the weights' gradients copied, in several parts; RNN's:
    (3, 2, 261, 1027, 1),
    (75, 30, 4, 180, 2),  # weights' gradients in several chunks of steps
    # Last panels of few units, folded, with terms left over; three panels before one:
    (12, 3, 19, 20, 1),
    (12, 7, 18, 37, 2),
    (20, 2, 41, 50, 1),
    (20, 1, 21, 56, 1),
]


def run(function, cell, inputs, grads):
    """Results and gradients of all inputs, as one flat list."""
    results = function(cell, *inputs)
    leaves = [inputs[0], *inputs[1], *inputs[2]]
    return [*results, *torch.autograd.grad(results, leaves, grads)]


def both(cell, inputs):
    """(kernel's, reference's) results and gradients; asserts that the kernels did the first."""
    grads = [torch.randn_like(r) for r in reference.scan(cell, *inputs)]
    with ran("kernel_forward", "kernel_backward"):
        ours = run(functional.layer, cell, inputs, grads)
    return ours, run(reference.scan, cell, inputs, grads)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("size", [*SIZES, (70, 30, 256, 256, 1)], ids=str)
def test_float64_equals_the_reference(cell, size):
    ours, expected = both(cell, layer_inputs(cell, *size, torch.float64))
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_error_is_at_most_twice_that_of_torch(cell, size):
    x, initial, weights = layer_inputs(cell, *size, torch.float32)
    exact_inputs = in_dtype((x, initial, weights), torch.float64)
    exact_results = reference.scan(cell, *exact_inputs)
    grads = [torch.randn_like(r).float().double() for r in exact_results]
    exact = run(reference.scan, cell, exact_inputs, grads)
    grads = [g.float() for g in grads]
    theirs = run(reference.scan, cell, (x, initial, weights), grads)
    with ran("kernel_forward", "kernel_backward"):
        ours = run(functional.layer, cell, (x, initial, weights), grads)
    # Errors of whole tensors: single elements of both are accidents of rounding. 4 ULP of the
    # largest element is what both may owe to the order of a sum.
    for a, b, e in zip(ours, theirs, exact, strict=True):
        floor = 4 * torch.finfo(torch.float32).eps * e.abs().max()
        ours_error = (a.double() - e).norm() / e.numel() ** 0.5
        their_error = (b.double() - e).norm() / e.numel() ** 0.5
        assert ours_error <= 2 * their_error + floor


NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# Where their products are others than float32's: test_bf16_products.py.
@pytest.mark.parametrize(
    "dtype",
    [torch.float16] * (not ops.SPLIT_PRODUCTS) + [torch.bfloat16] * (not ops.BF16_PRODUCTS),
    ids=str,
)
@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("size", [*SIZES[::3], SIZES[13]], ids=str)
def test_narrow_types_are_computed_in_float32(cell, dtype, size):
    inputs = layer_inputs(cell, *size, dtype)
    wide = in_dtype(inputs, torch.float32)
    results = functional.layer(cell, *wide)
    grads = [torch.randn_like(r).to(dtype) for r in results]
    expected = run(functional.layer, cell, wide, [g.float() for g in grads])
    with ran("kernel_forward", "kernel_backward"):
        ours = run(functional.layer, cell, inputs, grads)
    for a, e in zip(ours, expected, strict=True):
        assert torch.equal(a, e.to(dtype))


def relu_of_sum(x, bias):
    """relu(x + bias), in the kernels: one step of len(x) rows and one unit."""
    one = torch.ones(1, 1, dtype=x.dtype)
    state = torch.zeros(len(x), 1, dtype=x.dtype)
    with torch.no_grad(), ran("kernel_forward"):
        return functional.layer("rnn_relu", x[:, None], (state,), (one, one * 0, bias, None))[0][
            :, 0
        ]


@NARROW
def test_every_narrow_number_survives_the_way_to_float32_and_back(dtype):
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    expected = x.relu()
    if dtype is torch.bfloat16:  # its denormals are float32's, which the kernels flush
        expected[expected.abs() < torch.finfo(dtype).tiny] = 0
    for threads in (1, 2):  # which share the conversion
        with num_threads(threads):
            actual = relu_of_sum(x, None)
        assert torch.equal(actual.nan_to_num(1234), expected.nan_to_num(1234))
    try:
        torch.set_flush_denormal(True)  # float16's are float32's normal numbers
        flushed = relu_of_sum(x, None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed.nan_to_num(1234), expected.nan_to_num(1234))


@NARROW
@pytest.mark.parametrize("bias", [1.0, 1000.0, 3e-5, 6.1e-5])
def test_float32_is_rounded_to_nearest_even(dtype, bias):
    x = torch.arange(65536).to(torch.uint16).view(dtype)
    x = x[x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny)]
    bias = torch.tensor([bias]).to(dtype)
    expected = (x.float() + bias.float()).relu().to(dtype)
    assert torch.equal(relu_of_sum(x, bias), expected)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_inference_and_training_give_the_same_bits(cell, dtype, size):
    inputs = layer_inputs(cell, *size, dtype)
    training = functional.layer(cell, *inputs)
    with torch.no_grad(), ran("kernel_forward"):
        inference = functional.layer(cell, *inputs)
    for a, b in zip(training, inference, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (20, 1, 4, 256, 1),  # units split
        (20, 1, 4, 200, 2),  # directions split
        (20, 40, 4, 32, 1),  # rows split
        (20, 37, 4, 96, 2),
        (8, 9, 4, 161, 1),
        (17, 8, 256, 260, 1),  # factors of LSTM's and GRU's weight gradients copied
        (2, 5, 70, 300, 2),  # weights not packed
        (75, 30, 4, 180, 1),  # weights' gradients in several chunks of steps
        (70, 30, 256, 256, 1),  # and their factors copied
    ],
    ids=str,
)
def test_the_same_bits_for_every_thread_count(cell, dtype, size):
    inputs = layer_inputs(cell, *size, dtype)
    grads = [torch.randn_like(r) for r in functional.layer(cell, *inputs)]
    runs = []
    for threads in (1, 2, 3, 5, 8):  # 8: rows and units split, test_many_threads.py
        with num_threads(threads), ran("kernel_forward", "kernel_backward"):
            runs.append(run(functional.layer, cell, inputs, grads))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_rows_and_units_are_both_split():
    with num_threads(8):
        plan = ops.plan("lstm", *layer_inputs("lstm", 75, 30, 4, 180, 1, torch.float32))
    if plan.threads < 8:
        pytest.skip("fewer than 8 cores")
    assert (plan.row_shards, plan.unit_shards) == (4, 2)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_a_rows_bits_do_not_depend_on_its_batch(cell):
    # Tiles of every height: row 0 alone, and in batches of 2 to 17. More than 4 steps: with fewer,
    # the weights are not packed, and sums are taken in another order.
    x, initial, weights = layer_inputs(cell, 9, 17, 19, 50, 1, torch.float32)
    with torch.no_grad():
        alone = functional.layer(cell, x[:, :1], [s[:, :1] for s in initial], weights)
        for batch in range(2, 18):
            many = functional.layer(cell, x[:, :batch], [s[:, :batch] for s in initial], weights)
            for a, b in zip(alone, many, strict=True):
                assert torch.equal(a, b[:, :1])


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_strided_expanded_and_misaligned_arguments(cell):
    x, initial, weights = layer_inputs(cell, 5, 4, 6, 19, 2, torch.float64)
    odd = [
        x.detach().transpose(0, 1).contiguous().transpose(0, 1),
        *(s.detach()[:, :1].expand(2, 4, 19) for s in initial),
        *(w.detach().t().contiguous().t() if w.dim() == 2 else w.detach() for w in weights),
    ]
    misaligned = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape) for t in odd]
    for m, t in zip(misaligned, odd, strict=True):
        m.copy_(t)
    for tensors in (odd, misaligned):
        leaves = [t.detach().requires_grad_() for t in tensors]
        states = len(initial)
        inputs = (leaves[0], tuple(leaves[1 : 1 + states]), tuple(leaves[1 + states :]))
        ours, expected = both(cell, inputs)
        for a, b in zip(ours, expected, strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_missing_biases(cell):
    x, initial, weights = layer_inputs(cell, 4, 3, 5, 9, 2, torch.float64)
    for missing in ((2,), (3,), (2, 3)):
        kept = [None if i % 4 in missing else w for i, w in enumerate(weights)]
        leaves = [x, *initial, *(w for w in kept if w is not None)]
        with ran("kernel_forward", "kernel_backward"):
            ours = functional.layer(cell, x, initial, kept)
            grads = torch.autograd.grad(ours[0].square().sum(), leaves)
        expected = reference.scan(cell, x, initial, kept)
        right = torch.autograd.grad(expected[0].square().sum(), leaves)
        for a, b in zip((*ours, *grads), (*expected, *right), strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zero_batch(cell, steps, dtype):
    x, initial, weights = layer_inputs(cell, steps, 0, 3, 8, 2, dtype)
    with ran("kernel_forward", "kernel_backward"):
        results = functional.layer(cell, x, initial, weights)
        assert [tuple(r.shape) for r in results] == [(steps, 0, 16)] + [(2, 0, 8)] * len(initial)
        sum(r.sum() for r in results).backward()
    for w in weights:
        assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("steps", [2, 14])  # weights read as they lie in memory, and packed
@pytest.mark.parametrize("feature", [0, 18])  # the last is left over where a panel is folded
def test_nan_and_infinity_come_out_where_they_do_in_torch(cell, steps, feature):
    x, initial, weights = layer_inputs(cell, steps, 3, 19, 18, 1, torch.float32)
    with torch.no_grad(), ran("kernel_forward"):
        assert steps == 2 or ops.plan(cell, x, initial, weights).packed
        x[1, 0, feature] = float("nan")
        x[1, 1, feature] = float("inf")
        x[1, 2, feature] = -float("inf")
        ours = functional.layer(cell, x, initial, weights)
        expected = reference.scan(cell, x, initial, weights)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_denormal_states_count_as_zero_in_float32_only_and_the_mode_is_restored():
    tiny = 1e-40
    for dtype, kept in ((torch.float32, False), (torch.float64, True)):
        zeros = [torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype), None, None]
        with torch.no_grad(), ran("kernel_forward"):
            x = torch.zeros(3, 1, 1, dtype=dtype)
            zeros[1] = torch.ones(1, 1, dtype=dtype)
            out, _ = functional.rnn(x, torch.full((1, 1, 1), tiny, dtype=dtype), zeros)
        assert bool((out != 0).all()) is kept
        assert torch.tensor([tiny]).mul(1.0).item() != 0  # outside, denormals live


def test_long_sequences_do_not_drift():
    x, initial, weights = layer_inputs("lstm", 2000, 2, 3, 32, 1, torch.float32)
    with torch.no_grad():
        ours = functional.layer("lstm", x, initial, weights)
        exact = reference.scan(
            "lstm", x.double(), [s.double() for s in initial], [w.double() for w in weights]
        )
    assert relative_error(ours[0].double(), exact[0]) < 1e-5


BAD_LAYERS = {
    "input of one dimension": (
        lambda x, s, w: (x[0, 0], s, w),
        r"input must be \[T, B, I\], or \[B, I\] for one step, got \[5\]",
    ),
    "one step's input with a layer's states": (
        lambda x, s, w: (x[0], s, w),
        r"h0 must be \[3, 4\], got \[1, 3, 4\]",
    ),
    "no time steps": (lambda x, s, w: (x[:0], s, w), "sequence length to be larger than 0"),
    "h0 of another batch": (
        lambda x, s, w: (x, (s[0][:, :1], *s[1:]), w),
        r"h0 must be \[1, 3, 4\], got \[1, 1, 4\]",
    ),
    "too few weights": (lambda x, s, w: (x, s, w[:3]), "Expected 4 weights.*got 3"),
    "weight_ih of another input size": (
        lambda x, s, w: (x, s, (w[0][:, :1], *w[1:])),
        r"weight_ih must be \[\d+, 5\], got \[\d+, 1\]",
    ),
    "short bias": (
        lambda x, s, w: (x, s, (*w[:3], w[3][:2])),
        r"bias_hh must be \[\d+\], got \[2\]",
    ),
    "missing weight_hh": (lambda x, s, w: (x, s, (w[0], None, *w[2:])), "weight_hh must be"),
}


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("case", BAD_LAYERS)
def test_wrong_shapes_never_reach_a_kernel(cell, case):
    change, message = BAD_LAYERS[case]
    x, initial, weights = layer_inputs(cell, 2, 3, 5, 4, 1, torch.float32)
    before = dict(ops.counts)
    with pytest.raises(RuntimeError, match=message):
        functional.layer(cell, *change(x, initial, weights))
    assert ops.counts == before


def test_unknown_nonlinearity():
    x, initial, weights = layer_inputs("rnn_tanh", 2, 3, 5, 4, 1, torch.float32)
    with pytest.raises(ValueError, match="'tanh' or 'relu', got 'sigmoid'"):
        functional.rnn(x, initial[0], weights, "sigmoid")


# One sequence alone, whose input is projected ahead of its steps (csrc/cpu/ahead.h), in tiles of 5
# rows (GRU 7), two at a time from T = 21 (29) on: T with and without a last tile alone or a smaller
# one, I that the steps keep up with and not, sums of several parts, RNN panels by fours and more.
ALONE = [(18, 64, 100), (20, 64, 64), (21, 300, 70), (25, 33, 130), (38, 1, 180), (30, 130, 230)]
# Those whose weights are of the sizes that are projected so with these L2 caches, and their chunks.
AHEAD = {
    "lstm": {(18, 64, 100): 5, (25, 33, 130): 10},
    "gru": {(25, 33, 130): 7, (38, 1, 180): 14},
    "rnn_tanh": {(30, 130, 230): 10},
}
HAS_USUAL_L2 = limits.l2_bytes() in (1 << 20, 2 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", ALONE, ids=str)
@pytest.mark.parametrize("cell", AHEAD)
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(cell, size, directions, dtype):
    steps, features, hidden = size
    x, initial, weights = layer_inputs(cell, steps, 2, features, hidden, directions, dtype)
    alone = [t[:, :1].detach().contiguous() for t in (x, *initial)]
    sure = dtype is torch.float32 and ops.isa().startswith(("avx512", "amx")) and HAS_USUAL_L2
    for threads in (1, 2):
        with num_threads(threads), torch.no_grad(), ran("kernel_forward"):
            both = functional.layer(cell, x, initial, weights)
            one = functional.layer(cell, alone[0], tuple(alone[1:]), weights)
            plan = ops.plan(cell, alone[0], tuple(alone[1:]), weights)
        assert all(torch.equal(a, b[:, :1]) for a, b in zip(one, both, strict=True))
        if sure and size in AHEAD[cell] and plan.unit_shards == 1:
            assert plan.chunk == AHEAD[cell][size]
        with num_threads(threads), ran("kernel_forward"):
            saved = functional.layer(cell, alone[0], tuple(alone[1:]), weights)
        assert all(map(torch.equal, saved, one))
        with num_threads(threads), ran("kernel_forward", "kernel_backward"):
            grads = torch.autograd.grad(saved[0].sum(), weights)
            again = functional.layer(
                cell, alone[0], tuple(alone[1:]), weights, ops.Options(recompute=True)
            )
            found = torch.autograd.grad(again[0].sum(), weights)
        assert all(map(torch.equal, found, grads))


# T, B, I, H of an input whose rows of consecutive steps are not evenly spaced in memory, and
# whether a chunk is several of its steps all the same: of few sequences, or with weights beyond L2.
APART = {
    (40, 2, 37, 33): True,
    (100, 3, 64, 65): True,  # chunks of 16 steps, the last one smaller
    (21, 5, 33, 40): False,
    (20, 32, 33, 40): False,  # two threads share the rows
    (50, 7, 129, 1030): True,
    (3, 50, 129, 1030): False,  # more rows in a step than in a chunk
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "directions"),
    [(size, n) for size in APART for n in (1, 2) if n == 1 or size[3] < 1000],  # of time
    ids=str,
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_an_input_by_sequences_has_the_bits_of_one_by_steps(cell, size, directions, dtype):
    x, initial, weights = layer_inputs(cell, *size, directions, dtype)
    as_it_lies = dtype is not torch.bfloat16 or ops.BF16_PRODUCTS  # else widened before
    apart = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad(), ran("kernel_forward"):
        expected = functional.layer(cell, x, initial, weights)
    for threads in (1, 2):
        with num_threads(threads), torch.no_grad(), ran("kernel_forward"):
            results = functional.layer(cell, apart, initial, weights)
            plan = ops.plan(cell, apart, initial, weights)
        assert all(map(torch.equal, results, expected))
        with num_threads(threads), ran("kernel_forward"):
            saved = functional.layer(cell, apart, initial, weights)
        assert all(map(torch.equal, saved, expected))
        assert plan.packed
        if not as_it_lies:
            assert (plan.chunk > 1) == (2 * size[1] <= 48)  # kChunkRows
        elif HAS_USUAL_L2:
            assert (plan.chunk > 1) == APART[size]
        if size[1] == 32 and directions == 1:
            assert plan.row_shards == min(threads, len(os.sched_getaffinity(0)))
