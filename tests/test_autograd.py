"""The autograd Functions: first and second derivatives by finite differences, what is saved and
what is computed, and every transform of torch that a layer can meet. Values are
test_sequence.py's."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from helpers import ran
from layers import LAYER_CELLS, layer_inputs
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fusedrnn import functional, ops, reference

KERNELS = ("kernel_forward", "kernel_backward")
OPTIONS = [  # T, B, I, H, D, with biases
    (4, 2, 3, 5, 1, True),
    (3, 2, 2, 4, 2, True),
    (3, 2, 3, 3, 1, False),
    (1, 3, 2, 4, 2, True),
]


def flat_layer(cell, inputs, bias=True):
    """(function of all input tensors, those tensors), for gradcheck and the like."""
    x, initial, weights = inputs
    states = len(initial)
    kept = [w for i, w in enumerate(weights) if bias or i % 4 < 2]

    def function(x, *rest):
        weights = list(rest[states:])
        if not bias:
            weights = [
                w for i in range(0, len(weights), 2) for w in (*weights[i : i + 2], None, None)
            ]
        return functional.layer(cell, x, rest[:states], weights)

    return function, (x, *initial, *kept)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(cell, options):
    *size, bias = options
    function, tensors = flat_layer(cell, layer_inputs(cell, *size, torch.float64), bias)
    with ran(*KERNELS):
        assert gradcheck(function, tensors)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradgradcheck_through_the_reference(cell, options):
    *size, bias = options
    function, tensors = flat_layer(cell, layer_inputs(cell, *size, torch.float64), bias)
    with ran("kernel_forward", "reference"):
        assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_one_step_as_a_cell_takes_it(cell):
    x, initial, weights = layer_inputs(cell, 1, 3, 4, 5, 1, torch.float64)
    tensors = (x[0].detach().requires_grad_(), *(s[0].detach().requires_grad_() for s in initial))

    def function(x, *states):
        return functional.layer(cell, x, states, weights)

    with ran(*KERNELS):
        assert gradcheck(function, tensors)
    with ran("kernel_forward", "reference"):
        assert gradgradcheck(function, tensors)


def test_one_step_of_the_named_functions():
    for name, cell in (("lstm", "lstm"), ("gru", "gru"), ("rnn", "rnn_tanh")):
        x, initial, weights = layer_inputs(cell, 1, 3, 4, 5, 1, torch.float64)
        function = getattr(functional, name)
        results = function(x[0], *(s[0] for s in initial), weights)
        for a, b in zip(results, function(x, *initial, weights), strict=True):
            torch.testing.assert_close(a, b[0])


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_every_input_alone_gets_its_gradient(cell):
    inputs = layer_inputs(cell, 3, 2, 3, 4, 2, torch.float64)
    function, tensors = flat_layer(cell, inputs)
    results = function(*tensors)
    grads = [torch.randn_like(r) for r in results]
    expected = torch.autograd.grad(results, tensors, grads)
    for i in range(len(tensors)):
        alone = [t.detach() for t in tensors]
        alone[i].requires_grad_()
        with ran(*KERNELS):
            results = function(*alone)
            (grad,) = torch.autograd.grad(results, alone[i], grads)
        torch.testing.assert_close(grad, expected[i])


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_gradients_of_one_result_alone(cell):
    x, initial, weights = layer_inputs(cell, 4, 2, 3, 5, 2, torch.float64)
    leaves = (x, *initial, *weights)
    for i in range(1 + len(initial)):
        with ran(*KERNELS):
            result = functional.layer(cell, x, initial, weights)[i]
            grads = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
        result = reference.scan(cell, x, initial, weights)[i]
        expected = torch.autograd.grad(
            result.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("cell", "per_unit"), [("lstm", 5), ("gru", 4), ("rnn_tanh", 1)])
def test_memory_kept_for_backward(cell, per_unit):
    T, B, I, H = 7, 3, 2, 8  # noqa: E741
    x, initial, weights = layer_inputs(cell, T, B, I, H, 1, torch.float32)
    ours = {t.data_ptr() for t in (x, *initial, *weights)}
    saved = {}

    def pack(t):
        if t.data_ptr() not in ours:
            saved[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional.layer(cell, x, initial, weights)
    assert sum(saved.values()) == per_unit * T * B * H * 4


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_nothing_is_saved_without_grad(cell):
    x, initial, weights = layer_inputs(cell, 3, 2, 3, 4, 1, torch.float32)

    def pack(t):
        raise AssertionError("saved a tensor")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), ran("kernel_forward"):
        with torch.no_grad():
            functional.layer(cell, x, initial, weights)
        frozen = [t.detach() for t in (x, *initial, *weights)]
        states = len(initial)
        results = functional.layer(cell, frozen[0], frozen[1 : 1 + states], frozen[1 + states :])
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_a_result_changed_in_place_before_backward(cell):
    x, initial, weights = layer_inputs(cell, 3, 2, 3, 4, 1, torch.float64)
    expected = torch.autograd.grad(
        (functional.layer(cell, x, initial, weights)[0] * 2).sum(), (x, *weights)
    )
    output = functional.layer(cell, x, initial, weights)[0]
    output.mul_(2)
    for a, b in zip(torch.autograd.grad(output.sum(), (x, *weights)), expected, strict=True):
        assert torch.equal(a, b)


def test_a_weight_changed_in_place_before_backward_is_an_error():
    x, initial, weights = layer_inputs("gru", 3, 2, 3, 4, 1, torch.float64)
    output = functional.layer("gru", x, initial, weights)[0]
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_one_tensor_as_two_inputs(cell):
    # Tied weights (both directions), and LSTM's h0 as its c0.
    x, initial, weights = layer_inputs(cell, 3, 2, 3, 4, 1, torch.float64)
    h0 = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    leaves = (x, h0, *weights)

    def tied(x, h0, *weights):
        return functional.layer(cell, x, (h0,) * len(initial), weights * 2)

    assert gradcheck(tied, leaves)
    assert gradgradcheck(tied, leaves)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_retain_graph_and_its_absence(cell):
    x, initial, weights = layer_inputs(cell, 3, 2, 3, 4, 1, torch.float32)
    loss = functional.layer(cell, x, initial, weights)[0].square().sum()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, weights), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_jacobian_by_vmap_over_backward(cell):
    x, initial, weights = layer_inputs(cell, 3, 1, 2, 2, 1, torch.float64)
    x = x.detach()

    def function(x):
        return functional.layer(cell, x, initial, weights)[0].flatten()

    one_by_one = torch.autograd.functional.jacobian(function, x)
    at_once = torch.autograd.functional.jacobian(function, x, vectorize=True)
    torch.testing.assert_close(at_once, one_by_one)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_torch_func(cell):
    x, initial, weights = layer_inputs(cell, 3, 4, 2, 3, 1, torch.float64)
    x, initial, weights = (
        x.detach(),
        tuple(s.detach() for s in initial),
        tuple(w.detach() for w in weights),
    )

    def loss(weights, x, initial):
        return functional.layer(cell, x, initial, weights)[0].square().sum()

    leaves = [w.clone().requires_grad_() for w in weights]
    expected = torch.autograd.grad(loss(leaves, x, initial), leaves)
    with ran(*KERNELS):
        grads = torch.func.grad(loss)(weights, x, initial)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)
    # Per-sample gradients sum to the batch's.
    with ran(*KERNELS):
        samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 1))(
            weights, x.unsqueeze(2), tuple(s.unsqueeze(2) for s in initial)
        )
    for a, b in zip(samples, expected, strict=True):
        torch.testing.assert_close(a.sum(0), b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_forward_mode_tangents_are_never_dropped(cell):
    x, initial, weights = layer_inputs(cell, 3, 2, 2, 3, 1, torch.float64)
    tangent = torch.randn_like(x)

    def function(x):
        return functional.layer(cell, x, initial, weights)[0]

    with forward_ad.dual_level(), torch.no_grad(), ran("reference"):
        dual = forward_ad.make_dual(x.detach(), tangent)
        jvp = forward_ad.unpack_dual(function(dual)).tangent
    step = 1e-6
    with torch.no_grad():
        difference = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(jvp, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize(
    ("dtype", "computed_by"),
    [
        (torch.bfloat16, KERNELS),
        (torch.float16, KERNELS),
        (torch.complex64, ["reference"]),
    ],
    ids=str,
)
def test_other_dtypes(cell, dtype, computed_by):
    if cell == "rnn_relu" and dtype.is_complex:
        pytest.skip("relu of a complex number is not defined")
    x, initial, weights = layer_inputs(cell, 3, 2, 2, 3, 1, torch.float64)
    other = [t.detach().to(dtype).requires_grad_() for t in (x, *initial, *weights)]
    states = len(initial)
    with ran(*computed_by):
        results = functional.layer(cell, other[0], other[1 : 1 + states], other[1 + states :])
        results[0].abs().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == dtype for t in other)
    wide = functional.layer(cell, x, initial, weights)
    torch.testing.assert_close(
        results[0].to(torch.complex128), wide[0].to(torch.complex128), rtol=0.05, atol=0.05
    )


def test_counts_are_per_layer_call():
    x, initial, weights = layer_inputs("lstm", 3, 2, 3, 4, 2, torch.float32)
    before = dict(ops.counts)
    functional.layer("lstm", x, initial, weights)[0].sum().backward()
    rose = {k: ops.counts[k] - before[k] for k in before}
    assert rose == {"kernel_forward": 1, "kernel_backward": 1, "reference": 0, "torch": 0}


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_gradients_share_no_memory(cell):
    # autograd keeps what backward returns as .grad, and optimizers change that in place.
    x, initial, weights = layer_inputs(cell, 3, 2, 3, 4, 2, torch.float32)
    leaves = (x, *initial, *weights)
    sum(r.sum() for r in functional.layer(cell, x, initial, weights)).backward()
    storages = {leaf.grad.untyped_storage().data_ptr() for leaf in leaves}
    assert len(storages) == len(leaves)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_backward_inside_autocast_is_exact(cell):
    x, initial, weights = layer_inputs(cell, 4, 3, 5, 6, 1, torch.float32)
    leaves = (x, *initial, *weights)
    expected = torch.autograd.grad(functional.layer(cell, x, initial, weights)[0].sum(), leaves)
    loss = functional.layer(cell, x, initial, weights)[0].sum()
    with torch.autocast("cpu"), ran("kernel_backward"):
        grads = torch.autograd.grad(loss, leaves)
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_saved_tensors_that_come_back_in_another_layout(cell):
    x, initial, weights = layer_inputs(cell, 4, 3, 5, 6, 1, torch.float64)
    leaves = (x, *initial, *weights)
    expected = torch.autograd.grad(functional.layer(cell, x, initial, weights)[0].sum(), leaves)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.transpose(0, -1).contiguous(), lambda t: t.transpose(0, -1)
    ):
        loss = functional.layer(cell, x, initial, weights)[0].sum()
    with ran("kernel_backward"):
        grads = torch.autograd.grad(loss, leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize(
    "change", [torch.Tensor.half, lambda t: t[..., :1]], ids=["dtype", "shape"]
)
def test_saved_tensors_that_come_back_wrong(cell, change):
    x, initial, weights = layer_inputs(cell, 4, 3, 5, 6, 1, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t,
        # What the kernel saved: the one tensor of this size.
        lambda t: change(t) if t.numel() > weights[0].numel() else t,
    ):
        loss = functional.layer(cell, x, initial, weights)[0].sum()
    with pytest.raises(RuntimeError, match="saved_tensors_hooks must give back"):
        loss.backward()


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_a_traced_layer_is_recorded_in_operations_of_torch(cell):
    x, initial, weights = layer_inputs(cell, 3, 2, 4, 5, 1, torch.float64)
    x, weights = x.detach(), [w.detach() for w in weights]
    initial = [s.detach() for s in initial]

    def function(x):
        return functional.layer(cell, x, initial, weights)[0]

    with ran("reference"):
        traced = torch.jit.trace(function, x, check_trace=False)
        made = torch.fx.experimental.proxy_tensor.make_fx(function)(x)
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other), function(other))
    torch.testing.assert_close(made(other), function(other))
