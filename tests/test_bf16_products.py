"""Products of numbers rounded to bfloat16, or of two such parts of each ("high"), on CPUs that have
an instruction for them: against the reference in float64 with the operands of every product so, and
nothing else.
"""

from itertools import permutations

import pytest
import torch
from helpers import build, matmul_precision, ran
from layers import LAYER_CELLS, in_dtype, layer_inputs

from benchmarks.common import threads as num_threads
from fusedrnn import functional, modules, ops, reference

pytestmark = pytest.mark.skipif(not ops.BF16_PRODUCTS, reason="no bfloat16 products here")

# T, B, I, H, D: odd and even, below and above a vector's 16 lanes and its 32 numbers; enough steps
# for the weights to be laid out anew.
SIZES = [
    (9, 1, 1, 1, 1),
    (9, 3, 5, 7, 2),
    (20, 2, 33, 31, 1),
    (12, 13, 16, 32, 2),
    (10, 7, 65, 33, 1),
    (9, 64, 40, 130, 1),
    (11, 1, 600, 48, 2),
    (9, 3, 20, 260, 1),  # more units than a block of the weights' gradients
    (9, 3, 37, 39, 1),  # a panel folded by two
]


def parts(x):
    high = x.bfloat16().double()
    return high, (x - high).bfloat16().double()


def high(a, b):
    (a_high, a_low), (b_high, b_low) = parts(a), parts(b)
    return a_high @ b_high + a_high @ b_low + a_low @ b_high


MULTIPLY = {"medium": lambda a, b: parts(a)[0] @ parts(b)[0], "high": high}
# "high" is on CPUs with AMX; test_amx.py has it everywhere.
PRECISIONS = ["medium"] + ["high"] * ops.SPLIT_PRODUCTS
# float16's products, which its own numbers need to be exact, are those of "high".
NARROW = [torch.bfloat16] + [torch.float16] * ops.SPLIT_PRODUCTS


class RoundedProduct(torch.autograd.Function):
    """a @ w.T, and both products of its backward pass, by `multiply`."""

    @staticmethod
    def forward(ctx, multiply, a, w):
        ctx.multiply = multiply
        ctx.save_for_backward(a, w)
        return multiply(a, w.T)

    @staticmethod
    def backward(ctx, grad):
        a, w = ctx.saved_tensors
        of_weight = ctx.multiply(grad.flatten(0, -2).T, a.flatten(0, -2))
        return None, ctx.multiply(grad, w), of_weight


def rounded_linear(precision):
    def linear(a, w, bias=None):
        product = RoundedProduct.apply(MULTIPLY[precision], a, w)
        return product if bias is None else product + bias

    return linear


def run(function, cell, inputs, grads, *options):
    results = function(cell, *inputs, *options)
    leaves = [inputs[0], *inputs[1], *inputs[2]]
    return results, torch.autograd.grad(results, leaves, grads)


def distance(a, b):
    """The root mean square difference."""
    return ((a.double() - b).norm() / max(1, b.numel()) ** 0.5).item()


def check(monkeypatch, cell, size, precision, options=None):
    """float32 at "medium" is the rounded reference, far closer than to the exact one. At "high" it
    is as close to the exact one as the rounded reference is, but for a 2^-15th.
    """
    inputs = layer_inputs(cell, *size, torch.float32)
    if options is not None and options.batch_sizes is not None:
        inputs = (inputs[0].detach().flatten(0, 1).requires_grad_(), *inputs[1:])
        assert len(inputs[0]) == options.batch_sizes.sum()
    doubles = in_dtype(inputs, torch.float64)
    theirs = () if options is None else options[:4]
    grads = [torch.randn_like(r) for r in reference.scan(cell, *doubles, *theirs)]
    exact_results, exact = run(reference.scan, cell, doubles, grads, *theirs)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "linear", rounded_linear(precision))
        rounded_results, rounded = run(reference.scan, cell, doubles, grads, *theirs)
    floats = [g.float() for g in grads]
    with matmul_precision(precision), ran("kernel_forward", "kernel_backward"):
        results, found = run(functional.layer, cell, inputs, floats, options)
    for i, (ours, model, right) in enumerate(
        zip((*results, *found), (*rounded_results, *rounded), (*exact_results, *exact), strict=True)
    ):
        # float32's roundings now and then turn a rounding to bfloat16 the other way.
        noise = 2e-6 * right.abs().max().item()
        if precision == "high":
            noise = 2.0**-15 * right.abs().max().item()
            assert distance(ours, right) <= 1.5 * distance(model, right) + noise, i
        elif i == len(results) + 1 and options is not None and options.reset_to_initial:
            # Of h0: what it is the product with is summed over the steps behind it, then rounded.
            assert distance(ours, right) <= 1.5 * distance(model, right) + noise
        else:
            assert distance(ours, model) <= 0.2 * distance(right, model) + noise, i
    # If those bounds could not tell the two apart, they would say nothing.
    if precision == "medium":
        assert distance(exact_results[0], rounded_results[0]) > 1e-4
    assert not torch.equal(results[0], functional.layer(cell, *inputs, options)[0])


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_is_rounded_and_nothing_else(cell, size, precision, monkeypatch):
    check(monkeypatch, cell, size, precision)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize(
    "size",
    [(37, 4, 300, 387, 1), (49, 60, 4, 180, 1)],  # the second in two chunks of steps, but RNN
    ids=str,
)
def test_what_bfloat16_layers_give_is_float32s_rounded(cell, size):
    inputs = layer_inputs(cell, *size, torch.bfloat16)
    wide = in_dtype(inputs, torch.float32)
    grads = [torch.randn_like(r) for r in functional.layer(cell, *inputs)]
    with matmul_precision("medium"), ran("kernel_forward", "kernel_backward"):
        results, found = run(functional.layer, cell, wide, [g.float() for g in grads])
    expected = [t.bfloat16() for t in (*results, *found)]
    with ran("kernel_forward", "kernel_backward"):
        results, found = run(functional.layer, cell, inputs, grads)
    assert all(map(torch.equal, (*results, *found), expected))


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("wanted", [0, 1], ids=["input", "h0"])
def test_one_gradient_alone(cell, features, steps, wanted):
    """Each has its part of the scratch memory, also where nothing else is computed."""
    x, initial, weights = layer_inputs(cell, steps, 200, features, 64, 1, torch.bfloat16)
    leaf = (x, initial[0])[wanted]
    grads = [torch.randn_like(r) for r in functional.layer(cell, x, initial, weights)]
    with ran("kernel_forward", "kernel_backward"):
        results = functional.layer(cell, x, initial, weights)
        every = torch.autograd.grad(results, (x, *initial, *weights), grads)[wanted]
    others = [t for t in (x, *initial, *weights) if t is not leaf]
    for t in others:
        t.requires_grad_(False)
    with ran("kernel_forward", "kernel_backward"):
        (alone,) = torch.autograd.grad(functional.layer(cell, x, initial, weights), leaf, grads)
    assert alone.shape == leaf.shape
    assert torch.equal(alone, every)


@pytest.mark.skipif(not ops.SPLIT_PRODUCTS, reason="no products of two parts here")
@pytest.mark.parametrize("bias", [0.0, 1000.0])
def test_three_products_for_one(bias):
    """One number times one, of which low times low, a 2^-16th at most, is left out."""
    torch.manual_seed(0)
    x, w = torch.randn(4000, 1), torch.randn(5, 1)
    state, zero = torch.zeros(1, 4000, 5), torch.zeros(5, 5)
    with torch.no_grad(), matmul_precision("high"), ran("kernel_forward"):
        biases = torch.full((5,), bias), None
        found = functional.layer("rnn_relu", x[None], (state,), (w, zero, *biases))[0][0]
    x, w = x.double(), w.double().T
    expected = (high(x, w) + bias).relu()
    # float32's own roundings, of the largest of what is added.
    noise = 2.0**-22 * (expected.abs() + bias)
    assert ((found - expected).abs() <= noise).all()
    difference = (found - (x @ w + bias).relu()).abs()
    assert (difference <= 2.0**-15 * (x @ w).abs() + noise).all()
    if not bias:
        assert (difference > 2 * noise).any()


@pytest.mark.skipif(not ops.SPLIT_PRODUCTS, reason="no products of two parts here")
def test_two_parts_of_numbers_that_are_not_finite():
    inf, nan = float("inf"), float("nan")
    # 1 and 0.5 have no low part: an infinity's high one times that would be NaN.
    numbers = torch.tensor([1, 0.5, 1.001, -1, inf, -inf, nan, 3.3e38])
    x, w = numbers[:, None].repeat(40, 1), numbers[:, None]
    state, zero = torch.zeros(1, 320, 8), torch.zeros(8, 8)
    with torch.no_grad(), matmul_precision("high"), ran("kernel_forward"):
        found = functional.layer("rnn_relu", x[None], (state,), (w, zero, None, None))[0][0]
    expected = (x * w.T).relu()
    torch.testing.assert_close(found, expected, rtol=2.0**-15, atol=0, equal_nan=True)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_boundaries_and_sequences_of_several_lengths(cell, packed, precision, monkeypatch):
    T, B, H = 24, 4, 33
    sizes = torch.full((T,), B)
    if packed:  # as many rows, some sequences shorter
        sizes = torch.tensor([6] * 6 + [4] * 12 + [2] * 6)
        T, B = 24, 6
    rows = int(sizes.sum())
    torch.manual_seed(1)
    reset = torch.rand(rows) < 0.1
    size = (24, 4, 19, H, 2)
    options = ops.Options(sizes if packed else None, reset if packed else reset.view(T, B), True)
    if packed:
        inputs_of = layer_inputs

        def of_six(cell, T, B, I, H, D, dtype):  # noqa: E741
            x, _, weights = inputs_of(cell, T, B, I, H, D, dtype)
            return x, inputs_of(cell, T, 6, I, H, D, dtype)[1], weights

        monkeypatch.setattr(f"{__name__}.layer_inputs", of_six)
    check(monkeypatch, cell, size, precision, options)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_tensors_are_multiplied_as_they_are(cell, dtype):
    for size in SIZES:
        narrow = layer_inputs(cell, *size, dtype)
        x, initial, weights = narrow
        wide = [t.detach().float().requires_grad_() for t in (x, *initial, *weights)]
        states = len(initial)
        wide = (wide[0], tuple(wide[1 : 1 + states]), tuple(wide[1 + states :]))
        grads = [torch.randn(r.shape).to(dtype) for r in functional.layer(cell, *narrow)]
        with ran("kernel_forward", "kernel_backward"):
            results, found = run(functional.layer, cell, narrow, grads)
        with matmul_precision("medium" if dtype is torch.bfloat16 else "high"):
            expected = run(functional.layer, cell, wide, [g.float() for g in grads])
        for ours, right in zip((*results, *found), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(ours, right.to(dtype))


# Too short for the weights to be laid out anew, but for the last one's.
@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1, 1), (1, 5, 33, 31, 2), (2, 3, 40, 64, 1), (3, 1, 65, 130, 2), (1, 33, 64, 48, 1)],
    ids=str,
)
def test_short_calls_of_bfloat16_tensors(cell, size, monkeypatch):
    inputs = layer_inputs(cell, *size, torch.bfloat16)
    doubles = in_dtype(inputs, torch.float64)
    grads = [torch.randn(r.shape).bfloat16() for r in reference.scan(cell, *doubles)]
    with ran("kernel_forward", "kernel_backward"):
        results, found = run(functional.layer, cell, inputs, grads)
    doubled = [g.double() for g in grads]
    _, exact = run(reference.scan, cell, doubles, doubled)
    monkeypatch.setattr(reference, "linear", rounded_linear("medium"))
    expected, rounded = run(reference.scan, cell, doubles, doubled)
    for i, (ours, model) in enumerate(zip((*results, *found), (*expected, *rounded), strict=True)):
        bound = 1.1 * distance(model.bfloat16(), model) + 1e-5 * model.abs().max().item()
        if i == len(results) + 1:  # of h0: its last product is exact
            bound += 1.5 * distance(exact[1], model)
        assert distance(ours, model) <= bound, i


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize(
    "size",
    [(20, 33, 24, 40, 1), (20, 2, 130, 128, 2), (20, 2, 130, 128, 1), (49, 60, 4, 180, 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_same_bits_on_any_number_of_threads(cell, size, dtype):
    inputs = layer_inputs(cell, *size, dtype)
    grads = [torch.randn(r.shape).to(dtype) for r in functional.layer(cell, *inputs)]
    found = []
    for threads in (1, 2, 3, 5, 8):
        with num_threads(threads):
            results, gradients = run(functional.layer, cell, inputs, grads)
        found.append((*results, *gradients))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_one_call_alone(cell):
    inputs = layer_inputs(cell, 12, 5, 9, 33, 2, torch.float32)
    grads = [torch.randn_like(r) for r in functional.layer(cell, *inputs)]
    exact = run(functional.layer, cell, inputs, grads)
    rounded = run(functional.layer, cell, inputs, grads, ops.Options(bf16=True))
    with matmul_precision("medium"):
        medium = run(functional.layer, cell, inputs, grads)
    flat = ([*results, *found] for results, found in (exact, rounded, medium))
    for a, b, c in zip(*flat, strict=True):
        assert torch.equal(b, c)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("size", [(12, 5, 9, 33, 2), (49, 60, 4, 180, 1)], ids=str)
def test_gates_computed_again(cell, dtype, size):
    inputs = layer_inputs(cell, *size, dtype)
    grads = [torch.randn(r.shape).to(dtype) for r in functional.layer(cell, *inputs)]
    results, kept = run(functional.layer, cell, inputs, grads)
    with ran("kernel_forward", "kernel_backward"):
        same, again = run(functional.layer, cell, inputs, grads, ops.Options(recompute=True))
    assert all(map(torch.equal, results, same))
    assert all(map(torch.equal, kept, again))


class Precision:
    """What each torch.set_float32_matmul_precision makes of one layer."""

    def __init__(self, cell, dtype=torch.float32, **options):
        self.module = build(modules, cell, 24, 32, dtype=dtype, **options)
        self.input = torch.randn(20, 3, 24, dtype=dtype)

    def output(self, precision):
        with matmul_precision(precision), torch.no_grad(), ran("kernel_forward"):
            return self.module(self.input)[0]

    def changes(self, precision):
        return not torch.equal(self.output(precision), self.output("highest"))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_what_a_precision_changes(cell):
    assert Precision(cell).changes("medium")
    assert Precision(cell).changes("high") == ops.SPLIT_PRODUCTS
    assert not Precision(cell, torch.float64).changes("medium")
    assert not Precision(cell, torch.float16).changes("medium")


def test_projections_are_not_rounded():
    for precision in PRECISIONS:
        assert not Precision("LSTM", proj_size=16).changes(precision)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_autocast_rounds_products_back_and_forth(cell):
    module = build(modules, cell, 24, 32)
    input = torch.randn(20, 3, 24)
    gradients = {}
    for precision in ("highest", "medium"):
        for autocast in (False, True):
            module.zero_grad()
            with matmul_precision(precision), ran("kernel_forward", "kernel_backward"):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = module(input)[0]
                output.backward(torch.ones_like(output))
            gradients[precision, autocast] = module.weight_hh_l0.grad.clone()
    assert not torch.equal(gradients["highest", False], gradients["medium", False])
    assert torch.equal(gradients["highest", True], gradients["medium", False])
    assert torch.equal(gradients["medium", True], gradients["medium", False])


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_autocast_in_a_graph_has_the_same_products(cell):
    module = build(modules, cell, 24, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input = torch.randn(20, 3, 24)
    found = []
    for function in (module, compiled):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = function(input)[0]
        output.backward(torch.ones_like(output))
        found.append((output.detach(), module.weight_hh_l0.grad.clone()))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_short_calls_are_not_rounded_back_or_forth(cell, precision):
    inputs = layer_inputs(cell, 2, 3, 40, 64, 1, torch.float32)
    grads = [torch.randn_like(r) for r in functional.layer(cell, *inputs)]
    exact = run(functional.layer, cell, inputs, grads)
    with matmul_precision(precision):
        other = run(functional.layer, cell, inputs, grads)
    for a, b in zip((*exact[0], *exact[1]), (*other[0], *other[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_gates_of_a_short_call_computed_again(cell):
    inputs = layer_inputs(cell, 3, 2, 40, 64, 1, torch.float32)
    grads = [torch.randn_like(r) for r in functional.layer(cell, *inputs)]
    _, kept = run(functional.layer, cell, inputs, grads, ops.Options(bf16=True))
    _, again = run(functional.layer, cell, inputs, grads, ops.Options(bf16=True, recompute=True))
    for a, b in zip(kept, again, strict=True):
        assert distance(a, b.double()) <= 1e-5 * b.abs().max()


@pytest.mark.parametrize(
    ("forward", "backward"), [*permutations(["highest", *PRECISIONS], 2)], ids=str
)
def test_backward_multiplies_as_forward_did(forward, backward):
    inputs = layer_inputs("lstm", 20, 3, 9, 33, 1, torch.float32)
    leaves = [inputs[0], *inputs[1], *inputs[2]]
    found = []
    for precision in (forward, backward):
        with matmul_precision(forward):
            output = functional.layer("lstm", *inputs)[0]
        with matmul_precision(precision):
            found.append(torch.autograd.grad(output.sum(), leaves, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("steps", [1, 9])
def test_each_product_of_backward(cell, precision, steps):
    inputs = layer_inputs(cell, steps, 40, 40, 33, 1, torch.float32)
    results, saved = ops.forward(cell, *inputs, True)
    grads = tuple(map(torch.randn_like, results))
    states = len(inputs[1])
    needed = (True,) * (1 + states + 4)
    exact, other = (
        ops.backward(cell, *inputs, saved, grads, needed, None, 0, p)
        for p in ("highest", precision)
    )
    same = [*map(torch.equal, exact, other)]
    # input, h0, c0, weight_ih, weight_hh, biases. Of one step, grad_gates are no product's.
    of_c0 = [steps == 1] * (states - 1)
    assert same == [False, False, *of_c0, False, False, *[steps == 1] * 2]


def test_an_output_that_is_not_finite():
    x, initial, weights = layer_inputs("rnn_relu", 20, 3, 8, 33, 1, torch.bfloat16)
    with torch.no_grad():
        x[3, 0, 2], x[5, 1, 0] = float("nan"), float("inf")
        output = functional.layer("rnn_relu", x, initial, weights)[0]
        expected = reference.scan("rnn_relu", *in_dtype((x, initial, weights), torch.float64))[0]
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert not output[3:, 0].isfinite().any()
    assert output[:, 2].isfinite().all()
