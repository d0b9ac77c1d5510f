"""Layers with ops.Options (sequences of several lengths, boundaries, cell states) and projections:
the kernels against reference.py, and what must not change a bit."""

import itertools
import threading
import time

import numpy
import pytest
import torch
from helpers import ran
from layers import LAYER_CELLS, layer_inputs, relative_error

from benchmarks.common import threads as num_threads
from fusedrnn import LSTM, functional, ops

CASES = list(itertools.product(LAYER_CELLS, ("padded", "packed"), (None, "zero", "initial")))


def problem(cell, T, B, I, H, D, *, P=0, packed, reset, cells=False, dtype, seed=0):  # noqa: E741
    """(leaves, number of states, options): the leaves are input, initial states, weights."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    batch_sizes, rows = None, (T, B)
    if packed:
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        lengths[0] = T
        batch_sizes = (torch.arange(T).unsqueeze(1) < lengths).sum(1)
        rows = (int(batch_sizes.sum()),)
    mask = torch.rand(rows, generator=generator) < 0.3 if reset else None
    options = ops.Options(batch_sizes, mask, reset == "initial", cells)
    gates = ops.CELLS[cell].gates * H
    states = [randn(D, B, size) for size in (P or H, H)[: ops.CELLS[cell].states]]
    weights = []
    for _ in range(D):
        weights += [randn(gates, I), randn(gates, P or H, scale=(P or H) ** -0.5)]
        weights += [randn(gates), randn(gates)]
        weights += [randn(P, H, scale=H**-0.5)] if P else []
    return [randn(*rows, I), *states, *weights], len(states), options


def run(function, cell, leaves, num_states, options, seed=1):
    """Results, then gradients of every leaf from all results."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = function(
        cell, leaves[0], leaves[1 : 1 + num_states], leaves[1 + num_states :], options
    )
    assert results is not None
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    torch.autograd.backward(results, grads)
    return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "form", "reset"), CASES)
def test_kernels_match_the_reference(cell, form, reset, D):
    sizes = [(1, 1, 1, 1), (2, 3, 4, 5), (7, 5, 3, 17), (20, 17, 8, 33), (6, 40, 16, 64)]
    for seed, size in enumerate(sizes):
        for P in (0, 1, size[3] // 2) if cell == "lstm" else (0,):
            made = problem(
                cell,
                *size,
                D,
                P=min(P, size[3] - 1),
                packed=form == "packed",
                reset=reset,
                cells=cell == "lstm",
                dtype=torch.float64,
                seed=seed,
            )
            with ran("kernel_forward", "kernel_backward"):
                actual = run(functional.kernel_layer, cell, *made)
            expected = run(functional.reference_layer, cell, *made)
            for a, b in zip(actual, expected, strict=True):
                assert relative_error(a, b) < 1e-12


# Rows are split over threads, and units.
@pytest.mark.parametrize(("T", "B", "D"), [(75, 40, 1), (75, 40, 2), (900, 3, 1)])
@pytest.mark.parametrize(("cell", "form", "reset"), CASES)
def test_weights_gradients_in_several_chunks_of_steps(cell, form, reset, T, B, D):
    for P in (0, 50) if cell == "lstm" else (0,):
        leaves, num_states, options = problem(
            cell, T, B, 4, 180, D, P=P, packed=form == "packed", reset=reset, dtype=torch.float64
        )
        expected = run(functional.reference_layer, cell, leaves, num_states, options)
        found = []
        for n, again in ((1, False), (2, False), (2, True)):
            choice = options._replace(recompute=again)
            with num_threads(n), ran("kernel_forward", "kernel_backward"):
                found.append(run(functional.kernel_layer, cell, leaves, num_states, choice))
        for a, b in zip(found[0], expected, strict=True):
            assert relative_error(a, b) < 1e-12
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("P", [0, 24])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_the_same_bits_for_every_thread_count(cell, D, form, P):
    """Shapes that split the batch (B=48), and hidden units (B=3)."""
    if P and cell != "lstm":
        P = 0
    shared = []
    for B in (3, 48):
        leaves, num_states, options = problem(
            cell, 30, B, 64, 96, D, P=P, packed=form == "packed", reset="zero", dtype=torch.float32
        )
        found, used = [], []
        initial, weights = leaves[1 : 1 + num_states], leaves[1 + num_states :]
        for n in (1, 2, 8):
            with num_threads(n):
                used.append(ops.plan(cell, leaves[0], initial, weights, options))
                found.append(run(functional.kernel_layer, cell, leaves, num_states, options))
        if used[1].threads > 1:
            shared.append((used[1].row_shards, used[1].unit_shards))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))
    if D == 1 and len(shared) == 2:  # on one core there is one thread
        assert shared == [(1, 2), (2, 1)]


# A last vector of few units, or columns: T, B, I, H, P.
@pytest.mark.parametrize(
    "sizes", [(12, 3, 19, 100, 0), (12, 40, 19, 50, 0), (12, 40, 19, 50, 18), (7, 5, 280, 387, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_sizes_of_no_whole_vectors(cell, dtype, sizes):
    *sizes, P = sizes
    if P and cell != "lstm":
        pytest.skip("only LSTM has projections")
    leaves, num_states, options = problem(
        cell, *sizes, 1, P=P, packed=True, reset="zero", dtype=dtype
    )
    found = []
    for n, again in ((1, False), (2, False), (2, True)):
        choice = options._replace(recompute=again)
        with num_threads(n), ran("kernel_forward", "kernel_backward"):
            found.append(run(functional.kernel_layer, cell, leaves, num_states, choice))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    wide = [leaf.double() for leaf in leaves]
    expected = run(functional.reference_layer, cell, wide, num_states, options)
    bound = 1e-5 if dtype is torch.float32 else 20 * torch.finfo(dtype).eps
    for a, b in zip(found[0], expected, strict=True):
        if cell != "rnn_relu" or dtype is torch.float32:  # where rounding turns a relu
            assert relative_error(a.double(), b) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_other_dtypes(cell, dtype):
    leaves, num_states, options = problem(
        cell, 9, 6, 5, 20, 2, packed=True, reset="initial", cells=cell == "lstm", dtype=dtype
    )
    with ran("kernel_forward", "kernel_backward"):
        actual = run(functional.kernel_layer, cell, leaves, num_states, options)
    wide = [leaf.double() for leaf in leaves]
    expected = run(functional.reference_layer, cell, wide, num_states, options)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is dtype
        assert relative_error(a.double(), b) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_double_backward(cell):
    leaves, num_states, options = problem(
        cell, 3, 2, 2, 3, 2, packed=True, reset="initial", cells=cell == "lstm", dtype=torch.float64
    )

    def function(*tensors):
        initial, weights = tensors[1 : 1 + num_states], tensors[1 + num_states :]
        return functional.layer(cell, tensors[0], initial, weights, options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_each_gradient_alone():
    """From one result only, and for one leaf only."""
    leaves, num_states, options = problem(
        "lstm", 5, 4, 3, 6, 2, P=2, packed=True, reset="initial", cells=True, dtype=torch.float64
    )

    def results(function, tensors):
        return function(
            "lstm", tensors[0], tensors[1 : 1 + num_states], tensors[1 + num_states :], options
        )

    for i, wanted in itertools.product(range(4), range(len(leaves))):
        found = []
        for function in (functional.kernel_layer, functional.reference_layer):
            tensors = [leaf.detach() for leaf in leaves]
            tensors[wanted].requires_grad_()
            result = results(function, tensors)[i]
            found += torch.autograd.grad(result.square().sum(), tensors[wanted], allow_unused=True)
        if found[1] is None:  # cells do not depend on the last projection, say
            assert found[0] is None or not found[0].any()
        else:
            assert relative_error(*found) < 1e-12


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "form", "reset"), CASES)
def test_gates_computed_again(cell, form, reset, D):
    """The same bits, from less."""
    numbers = {"lstm": (5, 2), "gru": (4, 1)}.get(cell, (1, 1))  # a row and unit: of h as of c
    for P in (0, 7) if cell == "lstm" else (0,):
        leaves, num_states, options = problem(
            cell, 9, 17, 5, 33, D, P=P, packed=form == "packed", reset=reset, dtype=torch.float64
        )
        expected = run(functional.kernel_layer, cell, leaves, num_states, options)
        again = options._replace(recompute=True)
        with ran("kernel_forward", "kernel_backward"):
            actual = run(functional.kernel_layer, cell, leaves, num_states, again)
        assert all(map(torch.equal, actual, expected))
        detached = [leaf.detach() for leaf in leaves]
        arguments = (detached[0], detached[1 : 1 + num_states], detached[1 + num_states :])
        sizes = [
            ops.forward(cell, *arguments, True, o)[1].numel() / (D * detached[0].numel() / 5)
            for o in (options, again)
        ]
        if P:
            assert sizes == [5 * 33 + 7, 33 + 7]
        else:
            assert sizes == [33 * n for n in numbers]


def test_gates_computed_again_on_two_threads():
    for cell, B in itertools.product(LAYER_CELLS, (3, 48)):
        leaves, num_states, options = problem(
            cell, 30, B, 64, 96, 1, packed=False, reset=None, dtype=torch.float32
        )
        found = []
        for n, again in ((1, False), (1, True), (2, True)):
            choice = options._replace(recompute=again)
            with num_threads(n):
                found.append(run(functional.kernel_layer, cell, leaves, num_states, choice))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


def test_gradients_of_groups():
    """Boundaries and projections too: the groups' gradients of weights add up to all rows'."""
    for cell, P in [(c, 0) for c in LAYER_CELLS] + [("lstm", 2)]:
        leaves, num_states, options = problem(
            cell, 5, 6, 3, 7, 2, P=P, packed=False, reset="initial", dtype=torch.float64
        )
        leaves = [leaf.detach() for leaf in leaves]
        arguments = (leaves[0], leaves[1 : 1 + num_states], leaves[1 + num_states :])
        results, saved = ops.forward(cell, *arguments, True, options)
        grads, needed = tuple(map(torch.ones_like, results)), (True,) * len(leaves)
        whole = ops.backward(cell, *arguments, saved, grads, needed, options)
        found = ops.backward(cell, *arguments, saved, grads, needed, options, groups=3)
        first = 1 + num_states
        for a, b in zip(found[:first], whole[:first], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(found[first:], whole[first:], strict=True):
            assert a.shape == (3, *b.shape)
            torch.testing.assert_close(a.sum(0), b, rtol=1e-12, atol=1e-12)


def test_reset_everywhere_is_a_sequence_of_steps():
    leaves, _, _ = problem("gru", 6, 3, 4, 5, 1, packed=False, reset=None, dtype=torch.float64)
    input, h0, *weights = leaves
    options = ops.Options(None, torch.ones(6, 3, dtype=torch.bool), True)
    output, _ = functional.layer("gru", input, (h0,), weights, options)
    steps = [functional.layer("gru", x, (h0[0],), weights)[0] for x in input]
    torch.testing.assert_close(output, torch.stack(steps), rtol=1e-12, atol=1e-12)


def test_a_projection_to_more_than_it_is_of():
    """The initial zeros are as wide as h, which the modules never make wider than c."""
    leaves, num_states, options = problem(
        "lstm", 6, 40, 3, 4, 1, P=64, packed=False, reset=None, dtype=torch.float64
    )
    leaves = [leaves[0], *leaves[1 + num_states :]]
    actual = run(functional.kernel_layer, "lstm", leaves, 0, options)
    for a, b in zip(
        actual, run(functional.reference_layer, "lstm", leaves, 0, options), strict=True
    ):
        assert relative_error(a, b) < 1e-12


def test_a_mask_that_changes_during_a_call():
    """Threads that saw different masks would wait for each other for ever."""
    module = LSTM(16, 256)
    array = numpy.zeros((6, 3), dtype=bool)
    mask, stop = torch.from_numpy(array), threading.Event()

    def toggle():
        while not stop.is_set():
            numpy.logical_not(array, out=array)

    thread = threading.Thread(target=toggle)
    thread.start()
    input, deadline = torch.randn(6, 3, 16), time.monotonic() + 1
    try:
        with ran("kernel_forward"):
            while time.monotonic() < deadline:
                assert module(input, reset_mask=mask)[0].isfinite().all()
    finally:
        stop.set()
        thread.join()


def _sizes(*sizes, dtype=torch.int64):
    return ops.Options(torch.tensor(sizes, dtype=dtype))


WRONG = {
    "batch_sizes of a padded input": (torch.randn(4, 2, 3), _sizes(2, 2), r"\[N, I\]"),
    "rows missing": (torch.randn(4, 3), _sizes(3, 2), "batch_sizes"),
    "rising": (torch.randn(4, 3), _sizes(1, 3), "batch_sizes"),
    "not positive": (torch.randn(4, 3), _sizes(4, 0), "batch_sizes"),
    "none": (torch.randn(0, 3), _sizes(), "batch_sizes"),
    "int32": (torch.randn(4, 3), _sizes(2, 2, dtype=torch.int32), "int64"),
    "shape of reset": (
        torch.randn(4, 2, 3),
        ops.Options(None, torch.zeros(2, 4, dtype=torch.bool)),
        r"reset must be bool \[4, 2\]",
    ),
    "dtype of reset": (torch.randn(4, 2, 3), ops.Options(None, torch.zeros(4, 2)), "reset must be"),
    "cells of a GRU": (torch.randn(4, 2, 3), ops.Options(cells=True), "cells"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case):
    input, options, message = WRONG[case]
    weights = (torch.randn(15, 3), torch.randn(15, 5), None, None)
    with ran(), pytest.raises(RuntimeError, match=message):
        functional.layer("gru", input, (), weights, options)


def test_wrong_projections():
    w = (torch.randn(20, 3), torch.randn(20, 2), None, None)
    input = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="weight_hr"):
        functional.layer("lstm", input, (), (*w, None))
    with pytest.raises(RuntimeError, match=r"weight_hr must be \[2, 5\], got \[3, 5\]"):
        functional.layer("lstm", input, (), (*w, torch.randn(3, 5)))
    with pytest.raises(RuntimeError, match="LSTM"):
        functional.layer("gru", input, (), (*w, torch.randn(2, 5)))
    hx = (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(RuntimeError, match=r"c0 must be \[1, 2, 5\]"):
        functional.layer("lstm", input, hx, (*w, torch.randn(2, 5)))


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_batch_sizes_of_any_stride(cell):
    sizes = torch.tensor([3, 9, 2, 9, 2, 9])[::2]
    _, initial, weights = layer_inputs(cell, 1, 3, 4, 5, 1, torch.float32)
    x = torch.randn(7, 4, requires_grad=True)
    strided, dense = (ops.Options(s) for s in (sizes, sizes.contiguous()))
    assert ops.takes(cell, x, initial, weights, strided)
    with ran("kernel_forward", "kernel_backward"):
        ours = functional.layer(cell, x, initial, weights, strided)
        ours[0].sum().backward()
    expected = functional.layer(cell, x, initial, weights, dense)
    assert all(map(torch.equal, ours, expected))
