"""torch.compile, torch.export, ONNX and AOTInductor: a layer is one operator of a whole graph, and
computes what the module does without them. torch.func alone is test_func.py's."""

import contextlib
import io
import warnings

import numpy
import pytest
import torch
from helpers import CELLS, LAYERS, assert_same, build, flat, pair, raised, ran, run, states
from layers import LAYER_CELLS, layer_inputs
from torch import library as custom_operators
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.nested import nested_tensor_from_jagged
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fusedrnn import functional, library, modules, ops

I, H = 3, 8  # noqa: E741
KERNELS = ("kernel_forward", "kernel_backward")
SHAPES = ((4, 3), (5, 3), (6, 2), (7, 5), (3, 9))  # T, B


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Parent(nn.Module):
    """A module around the layer, so that Dynamo meets it as a submodule."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input, hx=None):
        result, final = self.module(input.sin(), hx)
        return result.cos(), final


def compiled(module, backend="aot_eager", fullgraph=True):
    return torch.compile(Parent(module), backend=backend, fullgraph=fullgraph)


def run_compiled(model, input, hx=None):
    return {name.replace("_orig_mod.", ""): t for name, t in run(model, input, hx).items()}


NO_FLAGS = (False, False, False)
ORDINARY = (None, None, *NO_FLAGS)


def operator_tensors(cell, dtype, directions=1, bias=True, proj_size=0, options=ORDINARY):
    """(tensors, grads of the results) of the operators of a cell."""
    x, initial, weights = layer_inputs(cell, 3, 4, 2, 3, directions, dtype)
    batch_sizes, reset, _, cells, *_ = options
    size = proj_size or 3
    if batch_sizes is not None:
        x = x.detach().flatten(0, 1)[: batch_sizes.sum()].requires_grad_()
    each = []
    for d in range(directions):
        weight_ih, weight_hh, *biases = weights[4 * d : 4 * d + 4]
        weight_hr = None
        if proj_size:
            weight_hh = weight_hh.detach()[:, :size].contiguous().requires_grad_()
            weight_hr = torch.randn(size, 3, dtype=dtype, requires_grad=True)
        each += [weight_ih, weight_hh, *(biases if bias else (None, None)), weight_hr]
    if proj_size:
        initial = (initial[0].detach()[..., :size].contiguous().requires_grad_(), initial[1])
    tensors = [x, *initial, *each, *[None] * (10 - len(each)), batch_sizes, reset]
    torch.manual_seed(1)
    rows = x.shape[:-1]
    shapes = [(*rows, size * directions), *(s.shape for s in initial)]
    grads = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if cell == "lstm":
        grads.append(torch.randn(*rows, 3 * directions, dtype=dtype) if cells else None)
    return tensors, grads


def options_of(cell, packed=False, reset=False, to_initial=False, recompute=False):
    """With cells for an LSTM, of sequences of the lengths 3, 2, 2, 1 where packed."""
    batch_sizes = torch.tensor([4, 3, 1]) if packed else None
    mask = torch.rand((8,) if packed else (3, 4), generator=torch.Generator().manual_seed(4)) < 0.4
    return batch_sizes, mask if reset else None, to_initial, cell == "lstm", recompute


OPERATOR_OPTIONS = [
    {"reset": True, "recompute": True},
    {"packed": True},
    {"packed": True, "reset": True, "to_initial": True, "recompute": True},
]


def needed_of(tensors):
    return [t is not None and (t.is_floating_point() or t.is_complex()) for t in tensors]


def detached(tensors):
    return [t if t is None else t.detach() for t in tensors]


@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_opcheck(cell):
    for directions, bias in ((1, True), (2, False)):
        tensors, grads = operator_tensors(cell, torch.float64, directions, bias)
        opcheck(cell, NO_FLAGS, tensors, grads)
        _, backward = library._OPERATORS[cell]
        saved = library._FORWARD[cell](True, NO_FLAGS, *detached(tensors))[-1]
        needed = needed_of(tensors)
        arguments = (2, needed, NO_FLAGS, *detached(tensors), saved, *grads)
        custom_operators.opcheck(backward, arguments)


def opcheck(cell, flags, tensors, grads):
    forward, backward = library._OPERATORS[cell]
    custom_operators.opcheck(forward, (False, flags, *tensors))
    custom_operators.opcheck(forward, (True, flags, *detached(tensors)))
    saved = forward(True, flags, *detached(tensors))[-1]
    # A graph of second derivatives is composed of the reference, which reads batch_sizes.
    leaves = tensors if tensors[-2] is None else detached(tensors)
    custom_operators.opcheck(backward, (0, needed_of(tensors), flags, *leaves, saved, *grads))


@pytest.mark.parametrize("given", OPERATOR_OPTIONS, ids=str)
@pytest.mark.parametrize(("cell", "proj_size"), [*((c, 0) for c in LAYER_CELLS), ("lstm", 2)])
def test_opcheck_of_options_and_projections(cell, proj_size, given):
    options = options_of(cell, **given)
    arguments = operator_tensors(cell, torch.float64, 2, True, proj_size, options)
    opcheck(cell, options[2:], *arguments)


@pytest.mark.parametrize("lengths", [[4, 0, 6, 1, 4], [0, 0], []], ids=str)
def test_opcheck_of_ragged(lengths):
    first = torch.arange(0, 6 * len(lengths), 6)
    arguments = (torch.tensor(lengths, dtype=torch.int64), first, 1, 6)
    custom_operators.opcheck(torch.ops.fusedrnn.ragged.default, arguments)


@pytest.mark.parametrize(
    ("cell", "proj_size", "given"),
    [*((c, 0, None) for c in LAYER_CELLS), *(("lstm", 2, g) for g in OPERATOR_OPTIONS)],
    ids=str,
)
def test_derivatives_of_the_operators(cell, proj_size, given):
    options = ORDINARY if given is None else options_of(cell, **given)
    flags = options[2:]
    tensors, _ = operator_tensors(cell, torch.float64, 2, False, proj_size, options)
    present = [i for i, n in enumerate(needed_of(tensors)) if n]

    def function(*chosen):
        arguments = list(tensors)
        for i, t in zip(present, chosen, strict=True):
            arguments[i] = t
        return tuple(library._FORWARD[cell](False, flags, *arguments))

    chosen = [tensors[i] for i in present]
    with ran(*KERNELS):
        assert gradcheck(function, chosen)
    assert gradgradcheck(function, chosen)
    assert gradcheck(function, chosen, check_forward_ad=True, check_backward_ad=False)
    primals = tuple(t.detach() for t in chosen)
    tangents = tuple(t.cos() for t in primals)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*p) for p in zip(primals, tangents, strict=True)]
        expected = [forward_ad.unpack_dual(r).tangent for r in function(*duals)]
    for a, b in zip(jvp(function, primals, tangents)[1], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_operators_on_tensors_that_the_kernels_do_not_take(groups, reset):
    options = ops.Options(*options_of("lstm", reset=True, to_initial=True) if reset else ())
    tensors, grads = operator_tensors("lstm", torch.complex128, options=options)
    flags = options[2:]
    forward, backward = library._OPERATORS["lstm"]
    with ran("reference"):
        *results, saved = forward(True, flags, *detached(tensors))
        found = backward(groups, needed_of(tensors), flags, *detached(tensors), saved, *grads)
    x, h0, c0, *weights = tensors
    expected = functional.reference_layer("lstm", x, (h0, c0), weights[:4], options)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [t for t, n in zip(tensors, needed_of(tensors), strict=True) if n]
    grads = [g for g in grads if g is not None]
    for a, b in zip(found, torch.autograd.grad(expected, leaves, grads), strict=True):
        torch.testing.assert_close(a if a.shape == b.shape else a.sum(0), b)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
        {"batch_first": True, "bias": False},
    ],
    ids=str,
)
def test_compiled_module_matches_torch(kind, options):
    theirs, ours = pair(kind, I, H, **options)
    model, expected = compiled(ours), Parent(theirs)
    for T, B in SHAPES[:3]:
        x = torch.randn(B, T, I) if "batch_first" in options else torch.randn(T, B, I)
        with ran(*KERNELS):
            actual = run_compiled(model, x)
        assert_same(actual, run(expected, x), torch.float32)


@pytest.mark.parametrize("kind", LAYERS)
def test_compiled_with_states_and_without_a_batch(kind):
    theirs, ours = pair(kind, I, H, num_layers=2)
    model, expected = compiled(ours), Parent(theirs)
    for shape in ((5, 4, I), (5, I)):
        hx = states(kind, 2, *shape[1:-1], H, dtype=torch.float32)
        with ran(*KERNELS):
            actual = run_compiled(model, torch.ones(shape), hx)
        assert_same(actual, run(expected, torch.ones(shape), hx), torch.float32)


def frames(module, train):
    """How many graphs were compiled after each of SHAPES."""
    counter = CompileCounterWithBackend("inductor")
    model = compiled(module, counter)
    found = []
    for T, B in SHAPES:
        with torch.set_grad_enabled(train), ran(*KERNELS[: 1 + train]):
            output, _ = model(torch.randn(T, B, I))
            if train:
                output.sum().backward()
        found.append(counter.frame_count)
    return found


@pytest.mark.parametrize(("kind", "train"), [("LSTM", True), ("GRU", False)])
def test_inductor_compiles_once_for_all_lengths(kind, train):
    module = build(modules, kind, I, H, num_layers=2, dropout=0.5 * train)
    # Automatic: anew when the length first differs, and when the batch does.
    assert frames(module, train) == [1, 2, 3, 3, 3]


def test_a_marked_length_and_batch_compile_once():
    counter = CompileCounterWithBackend("inductor")
    module = build(modules, "LSTM", I, H)
    model = compiled(module, counter)
    for T, B in SHAPES:
        x = torch.randn(T, B, I)
        torch._dynamo.mark_dynamic(x, (0, 1))
        torch.testing.assert_close(model(x)[0], Parent(module)(x)[0])
    assert counter.frame_count == 1


def test_dropout_between_layers_is_in_the_graph():
    module = build(modules, "LSTM", I, H, num_layers=2, dropout=0.5)
    x = torch.randn(5, 4, I)
    torch.manual_seed(0)
    expected = Parent(module)(x)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(module)(x)[0], expected)
    model = compiled(module, "inductor")  # which draws its own random numbers
    assert not torch.equal(model(x)[0], model(x)[0])
    module.eval()
    torch.testing.assert_close(model(x)[0], Parent(module)(x)[0])


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
def test_compiled_dtypes(dtype):
    module = build(modules, "GRU", I, H, dtype=dtype)
    x = torch.randn(4, 3, I).to(dtype)
    with ran(*KERNELS):
        output = compiled(module)(x)[0]
        output.sum().backward()
    torch.testing.assert_close(
        output, Parent(build(nn, "GRU", I, H, dtype=dtype))(x)[0], rtol=0.02, atol=0.02
    )


def other_calls():
    jagged = torch.nested.nested_tensor([torch.randn(4, I), torch.randn(2, I)], layout=torch.jagged)
    complex_input = torch.randn(4, 2, I, dtype=torch.complex64)
    return {
        "jagged": (build(modules, "LSTM", I, H), jagged),
        "complex": (build(modules, "GRU", I, H, dtype=torch.complex64), complex_input),
    }


@pytest.mark.parametrize("name", list(other_calls()))
def test_what_breaks_the_graph(name):
    module, input = other_calls()[name]
    model = torch.compile(lambda x: flat(list(module(x)))[-1] + 1, backend="aot_eager")
    torch.testing.assert_close(model(input), flat(list(module(input)))[-1] + 1)


WRONG = {
    "features": (torch.zeros(4, 2, 5), None),
    "state": (torch.zeros(4, 2, I), torch.zeros(1, 3, H)),
    "state of a list": (torch.zeros(4, 2, I), [torch.zeros(1, 2, H)]),
    "dtype": (torch.zeros(4, 2, I, dtype=torch.float64), None),
    "dtype of the state": (torch.zeros(4, 2, I), torch.zeros(1, 2, H, dtype=torch.float64)),
    "dimensions": (torch.zeros(4), None),
    "length": (torch.zeros(0, 2, I), None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_raises_as_without_compile(name):
    module = build(modules, "GRU", I, H)
    model = torch.compile(module, backend="eager")
    actual, expected = raised(lambda: model(*WRONG[name])), raised(lambda: module(*WRONG[name]))
    assert (type(actual), str(actual)) == (type(expected), str(expected))


def test_parametrized_weights_and_subclasses():
    class Doubled(modules.GRU):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    module = weight_norm(Doubled(I, H), "weight_hh_l0")
    x = torch.randn(4, 2, I)
    with ran(*KERNELS):
        output = compiled(module)(x)[0]
        output.sum().backward()
    torch.testing.assert_close(output, Parent(module)(x)[0])
    assert all(p.grad is not None for p in module.parameters())


def test_compiled_functions():
    x, _, weights = layer_inputs("rnn_tanh", 4, 3, I, H, 1, torch.float32)

    def function(x):
        return functional.layer("rnn_tanh", x, (), [*weights[:2], None, weights[3]])[0] + 1

    model = torch.compile(function, backend="aot_eager", fullgraph=True)
    for input in (x, x[0]):
        with ran(*KERNELS):
            actual = torch.autograd.grad(model(input).sum(), weights[:2])
        expected = torch.autograd.grad(function(input).sum(), weights[:2])
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_function_of_what_the_kernels_do_not_take():
    x, initial, weights = layer_inputs("gru", 4, 3, I, H, 1, torch.complex64)
    counter = CompileCounterWithBackend("aot_eager")

    def function(x):
        return functional.layer("gru", x, initial, weights)[0]

    model = torch.compile(function, backend=counter, fullgraph=True)
    for input in (x, x.detach() * 2, x.detach() * 3):
        torch.testing.assert_close(model(input), function(input))
    assert counter.frame_count <= 2  # with and without a gradient of the input


@pytest.mark.parametrize("kind", CELLS)
def test_compiled_cells(kind):
    theirs, ours = pair(kind, I, H)
    model = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(run_compiled(model, torch.ones(2, I)), run(theirs, torch.ones(2, I)), torch.float32)


def test_torch_func_inside_and_outside_of_compile():
    module = build(modules, "LSTM", I, H, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(4, 5, 2, I, dtype=torch.float64)

    def loss(weights, x):
        return functional_call(module, weights, (x,))[0].square().sum()

    def samples(x):
        return vmap(grad(loss), (None, 0))(weights, x)

    def tangents(x):
        return jvp(lambda x: module(x)[0], (x,), (x.cos(),))[1]

    for function in (samples, tangents):
        expected = function(x if function is samples else x[0])
        actual = torch.compile(function, backend="aot_eager")(x if function is samples else x[0])
        torch.testing.assert_close(actual, expected)
    model = torch.compile(module, backend="aot_eager")
    tangent = jvp(lambda x: model(x)[0], (x[0],), (x[0].cos(),))[1]
    torch.testing.assert_close(tangent, tangents(x[0]))
    for transform in (
        lambda m: vmap(lambda x: m(x)[0])(x),
        lambda m: grad(lambda x: m(x)[0].sum())(x[0]),
    ):
        torch.testing.assert_close(transform(model), transform(module))


# Options, projections, packed sequences and autocast in a graph -----------------------------------

LENGTHS = torch.tensor([4, 0, 6, 1, 4])
MASK = torch.rand((6, 5), generator=torch.Generator().manual_seed(4)) < 0.4
SORTED = [6, 4, 4, 2, 1]
UNSORTED = [4, 1, 6, 2, 4]


def pack(input, lengths=UNSORTED, sort=True):
    return pack_padded_sequence(input, torch.as_tensor(lengths), enforce_sorted=not sort)


def jagged(input, lengths=LENGTHS, dtype=torch.int64):
    """The first steps of padded input, as many as `lengths` say; offsets of `dtype`."""
    values = torch.cat([input[:n, b] for b, n in enumerate(lengths.tolist())])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return nested_tensor_from_jagged(values, offsets.to(dtype))


def tensors_of(result):
    """Those of a module's result, with the rows of a PackedSequence or a jagged tensor."""
    output, *rest = result
    first = output.data if isinstance(output, PackedSequence) else output
    return [r.values() if r.layout is torch.jagged else r for r in (first, *flat(rest))]


# Calls of a module with an input [6, 5, I], each one graph.
CALLS = {
    "padded": lambda m, x, hx: m(x, hx),
    "lengths": lambda m, x, hx: m(x, lengths=LENGTHS),
    "lengths, hx": lambda m, x, hx: m(x, hx, lengths=LENGTHS),
    "lengths, none": lambda m, x, hx: m(x, hx, lengths=0 * LENGTHS),
    "list of lengths": lambda m, x, hx: m(x, lengths=LENGTHS.tolist()),
    "reset": lambda m, x, hx: m(x, reset_mask=MASK),
    "reset to hx": lambda m, x, hx: m(x, hx, reset_mask=MASK, reset_to_hx=True),
    "lengths and reset": lambda m, x, hx: m(x, hx, lengths=LENGTHS, reset_mask=MASK),
    "packed": lambda m, x, hx: m(pack(x)),
    "packed, hx": lambda m, x, hx: m(pack(x), hx),
    "packed, sorted": lambda m, x, hx: m(pack(x, SORTED, False)),
    "packed, sorted, hx": lambda m, x, hx: m(pack(x, SORTED, False), hx),
    "jagged": lambda m, x, hx: m(jagged(x)),
    "jagged, hx": lambda m, x, hx: m(jagged(x), hx),
    "jagged, int32": lambda m, x, hx: m(jagged(x, dtype=torch.int32)),
    "cells": lambda m, x, hx: m(x, hx, return_cell_states=True),
    "cells and lengths": lambda m, x, hx: m(x, lengths=LENGTHS, return_cell_states=True),
}
BUILDS = {
    "LSTM": {"num_layers": 2, "bidirectional": True},
    "LSTM, projected": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "GRU": {"num_layers": 2, "bias": False},
    "RNN_relu": {"bidirectional": True},
}


def results_and_gradients(call, module, input, hx, backward_under=None):
    """Of call(module, input, hx), every result's part in them."""
    leaves = [input.detach().clone().requires_grad_()]
    leaves += [s.detach().clone().requires_grad_() for s in flat(hx)]
    state = None if hx is None else leaves[1] if len(leaves) == 2 else tuple(leaves[1:])
    results = tensors_of(call(module, leaves[0], state))
    loss = sum((r.to(input.dtype) * r.to(input.dtype).cos()).sum() for r in results)
    leaves += module.parameters()
    with backward_under or contextlib.nullcontext():
        found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [*(r.detach() for r in results), *found]


def hx_of(name, dtype=torch.float32):
    kind, options = name.partition(",")[0], BUILDS[name]
    first = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    hx = states(kind, first, 5, H, dtype=dtype)
    if "proj_size" in options:
        hx = (hx[0][..., : options["proj_size"]].contiguous(), hx[1])
    return hx


def in_one_graph(call, backend="aot_eager"):
    """`call` with what happens in the module compiled, and a PackedSequence made outside."""

    def compiled_call(module, *arguments):
        model = torch.compile(module, backend=backend, fullgraph=True)
        return call(model, *arguments)

    return compiled_call


def assert_one_graph(name, call, recompute=False):
    """With the bits of the eager call."""
    module = build(modules, name.partition(",")[0], I, H, **BUILDS[name])
    module.recompute_gates = recompute
    x, hx = torch.randn(6, 5, I), hx_of(name)
    expected = results_and_gradients(CALLS[call], module, x, hx)
    with ran(*(() if call == "lengths, none" else KERNELS)):
        actual = results_and_gradients(in_one_graph(CALLS[call]), module, x, hx)
    assert len(actual) == len(expected)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("call", CALLS)
def test_one_graph(call):
    assert_one_graph("LSTM, projected", call)


@pytest.mark.parametrize("call", ["padded", "lengths and reset", "packed, sorted"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN_relu"])
def test_one_graph_of_other_layers(name, call):
    assert_one_graph(name, call)


@pytest.mark.parametrize("call", ["padded", "lengths and reset", "packed"])
@pytest.mark.parametrize("name", BUILDS)
def test_one_graph_that_recomputes_gates(name, call):
    assert_one_graph(name, call, True)


@pytest.mark.parametrize(
    "call", ["lengths and reset", "cells and lengths", "packed, sorted", "jagged, int32"]
)
def test_one_graph_by_inductor(call):
    name = "LSTM, projected"
    module = build(modules, "LSTM", I, H, **BUILDS[name])
    module.recompute_gates = True
    x, hx = torch.randn(6, 5, I), hx_of(name)
    with ran(*KERNELS):
        actual = results_and_gradients(in_one_graph(CALLS[call], "inductor"), module, x, hx)
    expected = results_and_gradients(CALLS[call], module, x, hx)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [
        ("lengths", [1, 2, 3, 3, 3]),
        ("reset", [1, 2, 3, 3, 3]),
        ("packed", [1, 2, 3, 3, 3]),
        ("packed, sorted", [1, 2, 2, 2, 2]),
        ("jagged", [1, 1, 2, 2, 2]),
    ],
)
def test_sizes_of_every_kind_compile_once(kind, graphs):
    """Anew when the length first differs, of which a jagged tensor's graph knows nothing, and when
    the batch does, of which a sorted packed sequence's does not."""
    calls = {
        "lengths": lambda m, x, n: m(x, lengths=n),
        "reset": lambda m, x, n: m(x, reset_mask=torch.arange(len(x)).unsqueeze(1) == n),
        "packed": lambda m, x, n: m(pack(x, n.clamp(min=1))),
        "jagged": lambda m, x, n: m(jagged(x, n)),
        "packed, sorted": lambda m, x, n: m(
            pack(x, n.clamp(min=1).sort(descending=True)[0], sort=False)
        ),
    }
    counter = CompileCounterWithBackend("aot_eager")
    module = build(modules, "GRU", I, H, num_layers=2)
    model = torch.compile(module, backend=counter, fullgraph=True)
    found = []
    for T, B in SHAPES:
        x, n = torch.randn(T, B, I), torch.randint(0, T + 1, (B,))
        with ran(*KERNELS):
            actual = tensors_of(calls[kind](model, x, n))
            actual[0].sum().backward()
        assert all(map(torch.equal, actual, tensors_of(calls[kind](module, x, n))))
        found.append(counter.frame_count)
    assert found == graphs


@pytest.mark.parametrize("call", ["lengths", "packed, sorted", "mask of numpy"])
def test_what_breaks_the_graph_once_without_fullgraph(call):
    """Sizes that are known at run time only, and what is no tensor."""
    counter = CompileCounterWithBackend("aot_eager")
    module = build(modules, "LSTM", I, H, num_layers=2)
    x = torch.randn(6, 5, I)
    given = pack(x, SORTED, False) if call == "packed, sorted" else x
    keywords = {
        "lengths": {"lengths": LENGTHS},
        "packed, sorted": {},
        "mask of numpy": {"reset_mask": MASK.numpy()},
    }[call]

    @torch.compile(backend=counter)
    def model(x):
        return module(x, **keywords)[1][1] + 1

    with ran(*KERNELS):
        actual = model(given)
        actual.sum().backward()
    assert torch.equal(actual, module(given, **keywords)[1][1] + 1)
    assert counter.frame_count == 1


def test_packed_sequence_made_in_the_graph():
    module = build(modules, "LSTM", I, H)
    packed = pack(torch.randn(6, 5, I), SORTED, False)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def model(data, batch_sizes):
        return module(PackedSequence(data.sin(), batch_sizes))[0].data

    with ran(*KERNELS):
        actual = model(packed.data, packed.batch_sizes)
        actual.sum().backward()
    expected = module(PackedSequence(packed.data.sin(), packed.batch_sizes))[0].data
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_wrong_values_raise_where_the_graph_runs(backend):
    module = build(modules, "GRU", I, H)
    x = torch.randn(6, 5, I)
    model = torch.compile(module, backend=backend, fullgraph=True)
    model(x, lengths=LENGTHS)
    for wrong in ([7, 1, 1, 1, 1], [6, -1, 1, 1, 1], [2**40] * 5):
        lengths = torch.tensor(wrong)
        expected = raised(lambda n=lengths: module(x, lengths=n))
        actual = raised(lambda n=lengths: model(x, lengths=n))
        assert (type(actual), str(actual)) == (type(expected), str(expected))

    packed = pack(x, SORTED, False)
    wrong = ([5, 5, 5], [5, 4, 3, 1, 3, 1], [5, 4, 4, 4, 0], [6, 6, 6, -1], [0] * 6)
    for hx, more in ((None, ()), (torch.zeros(1, 5, H), ([6, 4, 3, 3, 1],))):
        model(packed, hx)
        for batch_sizes in (*wrong, *more):
            given = PackedSequence(packed.data, torch.tensor(batch_sizes))
            message = "h0 must be" if batch_sizes in more else "batch_sizes must be"
            with ran(), pytest.raises(RuntimeError, match=message):
                model(given, hx)


def test_wrong_keywords_raise_as_without_compile():
    module = build(modules, "LSTM", I, H)
    x = torch.randn(6, 5, I)
    for keywords in (
        {"lengths": torch.ones(6, dtype=torch.int64)},
        {"lengths": torch.ones(5)},
        {"reset_mask": MASK.t()},
        {"reset_mask": MASK.float()},
    ):
        expected = raised(lambda k=keywords: module(x, **k))
        model = torch.compile(module, backend="eager")
        actual = raised(lambda k=keywords, m=model: m(x, **k))
        assert (type(actual), str(actual)) == (type(expected), str(expected))


@pytest.mark.parametrize("initial", [True, False])
def test_compiled_functions_with_options(initial):
    x, given, weights = layer_inputs("lstm", 6, 5, I, H, 2, torch.float32)
    packed = pack(x.detach(), SORTED, False)
    mask = torch.rand(len(packed.data)) < 0.4

    def function(data, batch_sizes, mask):
        options = ops.Options(batch_sizes, mask, True, True, True)
        return functional.layer("lstm", data, given if initial else (), weights, options)

    arguments = (packed.data, packed.batch_sizes, mask)
    with ran(*KERNELS):
        actual = torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
        found = torch.autograd.grad(actual[3].sum(), weights)
    expected = function(*arguments)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, found, torch.autograd.grad(expected[3].sum(), weights)))


@pytest.mark.parametrize(
    ("where", "low"), [("inside", torch.bfloat16), ("around", torch.float16)], ids=str
)
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("call", ["padded", "lengths and reset", "packed"])
@pytest.mark.usefixtures("kernels_only")
def test_autocast_in_one_graph(name, call, where, low):
    """With the dtypes and the bits of the eager call."""
    module = build(modules, name.partition(",")[0], I, H, **BUILDS[name])
    x = torch.randn(6, 5, I)

    class Inside(nn.Module):
        def forward(self, *arguments, **keywords):
            with torch.autocast("cpu", low):
                return module(*arguments, **keywords)

    def function(model, *arguments):
        with torch.autocast("cpu", low):
            return CALLS[call](model, *arguments)

    def graph(module, *arguments):
        model = Inside() if where == "inside" else module
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
        return (CALLS[call] if where == "inside" else function)(model, *arguments)

    hx = hx_of(name)
    expected = results_and_gradients(function, module, x, hx)
    for backward_under in (None, torch.autocast("cpu", low)):
        with ran(*KERNELS):
            actual = results_and_gradients(graph, module, x, hx, backward_under)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype is b.dtype
            assert torch.equal(a, b)


@pytest.mark.usefixtures("kernels_only")
@pytest.mark.parametrize("name", BUILDS)
def test_autocast_by_inductor_is_as_exact(name):
    """Not the same bits: inductor leaves out the rounding between two layers."""
    module = build(modules, name.partition(",")[0], I, H, **BUILDS[name])
    x, hx = torch.randn(6, 5, I), hx_of(name)

    def function(model, *arguments):
        with torch.autocast("cpu"):
            return model(*arguments)

    expected = results_and_gradients(function, module, x, hx)
    with ran(*KERNELS):
        actual = results_and_gradients(in_one_graph(function, "inductor"), module, x, hx)
    double = hx.double() if isinstance(hx, torch.Tensor) else tuple(s.double() for s in hx)
    exact = results_and_gradients(CALLS["padded"], module.double(), x.double(), double)
    for a, b, e in zip(actual, expected, exact, strict=True):
        assert a.dtype is b.dtype
        bound = 2 * (b.double() - e).norm() + torch.finfo(torch.bfloat16).eps * e.norm()
        assert (a.double() - e).norm() <= bound


def test_autocast_of_the_whole_of_a_model():
    """The backward pass of its graph is none under autocast."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rnn = nn.Linear(I, I), build(modules, "GRU", I, H, num_layers=2)
            self.last = nn.Linear(H, 2)

        def forward(self, x, hx):
            with torch.autocast("cpu"):
                return self.last(self.rnn(self.first(x), hx)[0]), hx

    model, x, hx = Model(), torch.randn(6, 5, I), torch.randn(2, 5, H)
    expected = results_and_gradients(lambda m, *a: m(*a), model, x, hx)
    with ran(*KERNELS):
        actual = results_and_gradients(in_one_graph(lambda m, *a: m(*a)), model, x, hx)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_float64_under_autocast_stays_as_it_is_in_a_graph(low):
    module = build(modules, "LSTM", I, H, dtype=torch.float64)
    x = torch.randn(6, 5, I, dtype=torch.float64)
    expected = module(x)[0]
    model = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", low), ran("kernel_forward"):
        assert torch.equal(model(x)[0], expected)


def test_dtypes_that_autocast_does_not_convert_raise_as_without_compile():
    module = build(modules, "GRU", I, H)
    x = torch.randn(6, 5, I, dtype=torch.float64)
    with torch.autocast("cpu"):
        expected = raised(lambda: module(x))
        actual = raised(lambda: torch.compile(module, backend="aot_eager")(x))
    assert (type(actual), str(actual)) == (type(expected), str(expected))


@pytest.mark.parametrize("keywords", [{}, {"lengths": LENGTHS}, {"reset_mask": MASK}], ids=str)
def test_per_sample_gradients_in_one_graph(keywords):
    module = build(modules, "LSTM", I, H, proj_size=2, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, 6, 5, I, dtype=torch.float64)

    def loss(weights, x):
        return functional_call(module, weights, (x,), keywords)[0].square().sum()

    def samples(x):
        return vmap(grad(loss), (None, 0))(weights, x)

    with ran(*KERNELS):
        actual = torch.compile(samples, backend="aot_eager", fullgraph=True)(x)
    for i, one in enumerate(x):
        for key, gradient in grad(loss)(weights, one).items():
            torch.testing.assert_close(actual[key][i], gradient)


# Export ------------------------------------------------------------------------------------------


def onnx_file(module, x, **options):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), file, verbose=False, **options)
    return file.getvalue()


def onnx_operators(data):
    onnx = pytest.importorskip("onnx")
    return [node.op_type for node in onnx.load_from_string(data).graph.node]


def run_onnx(data, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(data)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


def assert_runs(data, module, x):
    for a, b in zip(run_onnx(data, x), flat(module(x)), strict=True):
        numpy.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_onnx_with_any_length_and_batch(kind):
    pytest.importorskip("onnx")
    theirs, ours = (m.eval() for m in pair(kind, I, H, num_layers=2, bidirectional=True))
    x = torch.randn(5, 2, I)
    options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "T", 1: "B"}}}
    data = onnx_file(ours, x, **options)
    operators = onnx_operators(data)
    assert kind.partition("_")[0] in operators
    assert operators == onnx_operators(onnx_file(theirs, x, **options))
    for shape in ((5, 2, I), (9, 4, I), (1, 1, I)):
        assert_runs(data, ours, torch.randn(shape))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_onnx_by_dynamo(kind):
    pytest.importorskip("onnxscript")
    theirs, ours = (m.eval() for m in pair(kind, I, H, batch_first=True))
    x = torch.randn(2, 5, I)
    data = onnx_file(ours, x, dynamo=True)
    operators = onnx_operators(data)
    assert kind in operators
    assert operators == onnx_operators(onnx_file(theirs, x, dynamo=True))
    assert_runs(data, ours, x)


def test_exported_module_with_any_batch():
    theirs, ours = pair("LSTM", I, H)
    for module in (theirs, ours):
        batch = torch.export.Dim("B")
        program = torch.export.export(module, (torch.randn(5, 2, I),), dynamic_shapes=({1: batch},))
        assert torch.ops.aten.lstm.input in [node.target for node in program.graph.nodes]
    x = torch.randn(5, 7, I)
    torch.testing.assert_close(program.module()(x), theirs(x))


class Layer(nn.Module):
    """A layer as a function, whose exported graph has fusedrnn's operator."""

    def __init__(self):
        super().__init__()
        self.lstm = build(modules, "LSTM", I, H)

    def forward(self, x):
        return functional.layer("lstm", x, (), tuple(self.lstm.parameters()))


class Extended(Layer):
    """As Layer, with options."""

    def forward(self, x, mask):
        options = ops.Options(reset=mask, cells=True, recompute=True)
        return functional.layer("lstm", x, (), tuple(self.lstm.parameters()), options)


def test_exported_function_with_options():
    model = Extended()
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    x, mask = torch.randn(6, 5, I), MASK
    program = torch.export.export(model, (x, mask), dynamic_shapes=(dims, dims))
    operators = [node.target for node in program.graph.nodes]
    assert operators.count(torch.ops.fusedrnn.lstm_forward.default) == 1
    x, mask = torch.randn(4, 7, I), torch.rand(4, 7) < 0.4
    with ran("kernel_forward"):
        actual = program.module()(x, mask)
    assert all(map(torch.equal, actual, model(x, mask)))


def test_aot_inductor(tmp_path):
    model = Layer().requires_grad_(False)
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    x = torch.randn(4, 3, I)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": dims})
    operators = [node.target for node in program.graph.nodes]
    assert torch.ops.fusedrnn.lstm_forward.default in operators
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for T, B in SHAPES:
        x = torch.randn(T, B, I)
        with ran("kernel_forward"):
            actual = package(x)
        torch.testing.assert_close(tuple(actual), model(x))
