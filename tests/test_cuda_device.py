"""The CUDA kernels on a GPU: what test_cuda.py cannot see on its emulation. Rounding of the real
instructions, the order of kernels and streams, graphs, other devices, sizes, and NVIDIA's own
checkers."""

import copy
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LAYERS, build, flat, raised, ran, run
from test_cuda import (
    FORMS,
    PATHS,
    PROJECTIONS,
    SHAPES,
    allowed,
    assert_as_exact,
    by_layer,
    dtype_of,
    errors,
    gradients,
    of_module,
)
from test_cuda import MODULES as KINDS
from test_options import CASES, problem
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import cuda, functional, modules, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not cuda.available(torch.device("cuda")),
    reason="no CUDA GPU, or a build without CUDA kernels",
)

DEVICE = torch.device("cuda")
TRAINED = ("kernel_forward", "kernel_backward")
BOTH_PATHS = pytest.mark.parametrize("path", ["step", "block"])

# Beyond one tile of units, one CTA's rows and one round of CTAs.
LARGER = {
    "tiles of rows": dict(T=30, B=70, I=24, H=96, D=2),
    "packed, boundaries": dict(T=40, B=33, I=24, H=100, D=2, packed=True, reset="initial"),
    "all warps": dict(T=12, B=11, I=24, H=192, D=1),
    "wide": dict(T=30, B=64, I=64, H=512, D=1),
    "wide, packed, boundaries": dict(T=25, B=45, I=24, H=331, D=2, packed=True, reset="zero"),
}
WIDE_PROJECTION = dict(T=20, B=40, I=24, H=300, P=140, D=2)


@pytest.fixture
def choose(monkeypatch):
    """choose(path, number): the kernels that run from here on."""

    def chosen(path, number="float32"):
        monkeypatch.setattr(cuda, "forced", path)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", number == "tf32")

    return chosen


def moved(leaves, device=None):
    return [leaf.detach().to(device or DEVICE).requires_grad_() for leaf in leaves]


def on_device(cell, number, shape, seed=0, **more):
    """problem(): (leaves on the CPU, the same on the device, number of states, options)."""
    shape = {"packed": False, "reset": None, **shape}
    leaves, num_states, options = problem(cell, dtype=dtype_of(number), seed=seed, **shape)
    if options.reset is not None:
        options = options._replace(reset=options.reset.to(DEVICE))
    return leaves, moved(leaves), num_states, options._replace(**more)


def skip_unless_it_fits(cell, leaves, num_states, options):
    n = 1 + num_states
    layer = cuda._Layer(cell, leaves[0], leaves[1:n], leaves[n:], options)
    if not (layer.kernels.block_ctas(False) and layer.kernels.block_ctas(True)):
        pytest.skip("too large for the block path")


def check(choose, cell, number, path, shape, seed=0, **more):
    leaves, here, num_states, options = on_device(cell, number, shape, seed, **more)
    choose(path, number)
    if path == "block":
        skip_unless_it_fits(cell, here, num_states, options)
    with ran(*TRAINED):
        results, found = gradients(by_layer, here, num_states, options, cell)
    for tensor in (*results, *found):
        assert tensor.device == here[0].device
    reset = None if options.reset is None else options.reset.cpu()
    assert_as_exact(
        number,
        cell,
        leaves,
        num_states,
        options._replace(reset=reset),
        [r.cpu() for r in results],
        [f.cpu() for f in found],
        same_products=False,
    )


# One layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGER.values()], ids=[*SHAPES, *LARGER])
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize(("number", "path"), PATHS)
def test_forward_and_backward(number, path, cell, shape, choose):
    check(choose, cell, number, path, shape)


@pytest.mark.parametrize("shape", PROJECTIONS)
@pytest.mark.parametrize("number", dict(PATHS))
def test_projection(number, shape, choose):
    check(choose, "lstm", number, "step", PROJECTIONS[shape])
    check(choose, "lstm", number, "step", WIDE_PROJECTION)


@pytest.mark.parametrize("shape", [SHAPES["packed, boundaries"], LARGER["wide"]], ids=str)
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize("number", dict(PATHS))
def test_gates_computed_again(number, cell, shape, choose):
    check(choose, cell, number, "step", shape, recompute=True)


@BOTH_PATHS
@pytest.mark.parametrize("shape", ["packed", "boundaries"])
def test_every_cell_state(shape, path, choose):
    check(choose, "lstm", "float32", path, SHAPES[shape], cells=True)
    check(choose, "lstm", "bfloat16", path, LARGER["packed, boundaries"], cells=True)


@BOTH_PATHS
def test_tf32_is_torchs_setting(path, choose):
    _, here, num_states, options = on_device("lstm", "float32", LARGER["packed, boundaries"])
    found = []
    for number in ("float32", "tf32"):
        choose(path, number)
        if path == "block":
            skip_unless_it_fits("lstm", here, num_states, options)
        found.append(gradients(by_layer, here, num_states, options, "lstm")[0][0])
    assert not torch.equal(*found)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("cell", "form", "reset"), CASES)
def test_gradcheck(cell, form, reset, D, choose):
    choose("step")
    for P, more in ((0, {}), (0, {"recompute": True}), (2, {"cells": True})):
        if cell != "lstm" and P:
            continue
        shape = dict(T=3, B=2, I=2, H=3, P=P, D=D, packed=form == "packed", reset=reset)
        _, here, num_states, options = on_device(cell, "float64", shape, **more)

        def function(*tensors, n=num_states, o=options):
            return by_layer(cell, tensors, n, o)

        with ran(*TRAINED):
            assert torch.autograd.gradcheck(function, here)


# Modules ------------------------------------------------------------------------------------------

T, B, I, H = 6, 5, 3, 20  # noqa: E741
LENGTHS = [4, 0, 6, 1, 4]
OPTIONS = {
    "plain": {},
    "layers and directions": dict(num_layers=2, bidirectional=True),
    "batch first, no bias": dict(batch_first=True, bias=False, bidirectional=True),
    "no dropout in eval": dict(num_layers=2, dropout=0.5),
    "projection": dict(num_layers=2, bidirectional=True, proj_size=7),
}
MODULES = [(k, o) for k in LAYERS for o in OPTIONS if k == "LSTM" or o != "projection"]
CALLS = {
    "padded": {},
    "hx": {},
    "packed": {},
    "lengths": dict(lengths=LENGTHS),
    "reset_mask": dict(reset_mask=True),
    "reset_to_hx": dict(reset_mask=True, reset_to_hx=True),
    "lengths, reset_mask": dict(lengths=LENGTHS, reset_mask=True),
    "return_cell_states": dict(return_cell_states=True),
}


class Called(nn.Module):
    """A module called in one of the ways of CALLS."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call, self.keywords = module, call, dict(CALLS[call])
        if "reset_mask" in self.keywords:
            shape = (B, T) if module.batch_first else (T, B)
            mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
            self.keywords["reset_mask"] = mask

    def forward(self, input, hx=None):
        if self.call == "packed":
            lengths = [max(1, n) for n in LENGTHS]
            packed = pack_padded_sequence(
                input, lengths, self.module.batch_first, enforce_sorted=False
            )
            output, final = self.module(packed, hx)
            return output.data, final
        keywords = dict(self.keywords)
        if "reset_mask" in keywords:
            keywords["reset_mask"] = keywords["reset_mask"].to(input.device)
        return self.module(input, hx, **keywords)


def input_and_hx(options, call, dtype):
    generator = torch.Generator().manual_seed(2)
    shape = (B, T, I) if options.get("batch_first") else (T, B, I)
    input = torch.randn(shape, generator=generator).to(dtype)
    if call not in ("hx", "packed", "reset_to_hx"):
        return input, None
    first = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    sizes = (options.get("proj_size") or H, H)
    return input, tuple(torch.randn(first, B, s, generator=generator).to(dtype) for s in sizes)


def by_reference(monkeypatch, module, input, hx, dtype):
    """run() of a copy on the CPU, in `dtype` and by reference.py."""
    with monkeypatch.context() as patch:
        patch.setattr(
            modules, "kernel_layer", lambda *layer: functional.reference_layer(*layer[:5])
        )
        patch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", False)
        states = None if hx is None else tuple(s.to(dtype) for s in hx)
        with ran("reference"):
            return run(copy.deepcopy(module).to(dtype), input.to(dtype), states)


@pytest.mark.parametrize(("kind", "options"), MODULES)
@pytest.mark.parametrize(("number", "path"), PATHS)
def test_modules(number, path, kind, options, choose, monkeypatch):
    dtype, options = dtype_of(number), OPTIONS[options]
    if path == "block" and "proj_size" in options:
        pytest.skip("the block path has no projection")
    module = build(modules, kind, I, H, **options).to(dtype).eval()
    for call in CALLS:
        if call == "return_cell_states" and kind != "LSTM":
            continue
        input, hx = input_and_hx(options, call, dtype)
        hx = hx if hx is None or kind == "LSTM" else hx[1:]
        exact = by_reference(monkeypatch, Called(module, call), input, hx, torch.float64)
        plain = by_reference(monkeypatch, Called(module, call), input, hx, dtype)
        choose(path, number)
        on_it = Called(copy.deepcopy(module).to(DEVICE), call)
        states = None if hx is None else [s.to(DEVICE) for s in hx]
        with ran(*TRAINED):
            found = run(on_it, input.to(DEVICE), states)
        assert found.keys() == exact.keys()
        assert all(t.device.type == DEVICE.type and t.dtype == dtype for t in found.values())
        mine = errors([t.cpu() for t in found.values()], list(exact.values()))
        bounds = allowed(number, list(plain.values()), list(exact.values()))
        for key, error, bound in zip(found, mine, bounds, strict=True):
            if number != "float64" and kind == "RNN_relu" and key.startswith("grad"):
                continue  # at about zero, rounding decides
            assert error <= bound, f"{call}, {key}: {error:.1e}, allowed {bound:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_modules_as_on_the_cpu(form, kind):
    expected = of_module(kind, form)
    with ran(*TRAINED):
        found = of_module(kind, form, DEVICE)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_double_backward(cell, choose):
    choose("step")
    shape = dict(T=2, B=2, I=1, H=2, D=1)
    _, here, num_states, options = on_device(cell, "float64", shape)

    def function(*tensors):
        return by_layer(cell, tensors, num_states, options)

    assert torch.autograd.gradgradcheck(function, here, fast_mode=True)


def test_torch_func(choose):
    """Gradients of each sample."""
    choose("step")
    module = build(modules, "LSTM", I, H, dtype=torch.float64)
    input, _ = input_and_hx({}, "padded", torch.float64)
    samples = input.movedim(1, 0)

    def gradients_of_each(device):
        parameters = {n: p.detach().to(device) for n, p in module.named_parameters()}

        def loss(parameters, sample):
            return torch.func.functional_call(module, parameters, (sample,))[0].square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
        return each(parameters, samples.to(device))

    found, expected = gradients_of_each(DEVICE), gradients_of_each("cpu")
    for name in expected:
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_compile_and_inference_mode(kind):
    module, input = trained_module(kind), random_input(1)
    with torch.inference_mode(), ran("kernel_forward"):
        expected = flat(module(input))
    compiled = torch.compile(module, backend="aot_eager")
    with torch.inference_mode():
        found = flat(compiled(input))
    torch.testing.assert_close(found, expected)
    found = step_of_training(compiled, input)
    torch.testing.assert_close(found, step_of_training(module, input))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast(kind, low):
    theirs, ours = (build(n, kind, I, H, 2, device=DEVICE) for n in (nn, modules))
    double = copy.deepcopy(ours).cpu().double()
    input = torch.randn(T, B, I, generator=torch.Generator().manual_seed(1))
    exact, _ = double(input.double())
    exact.square().sum().backward()
    expected_grads = [p.grad for p in double.parameters()]
    input = input.to(DEVICE)
    if low is torch.float16:  # torch takes it for bfloat16 too
        with torch.autocast(DEVICE.type, low):
            assert {r.dtype for r in flat(theirs(input))} == {low}
    for inside in (True, False):  # backward, that is
        ours.zero_grad()
        with ran(*TRAINED):
            with torch.autocast(DEVICE.type, low):
                results = flat(ours(input))
                if inside:
                    results[0].float().square().sum().backward()
            if not inside:
                results[0].float().square().sum().backward()
        assert {r.dtype for r in results} == {low}
        rounding = torch.finfo(low).eps
        assert (results[0].double().cpu() - exact).abs().max() < 8 * rounding
        for p, e in zip(ours.parameters(), expected_grads, strict=True):
            assert p.grad.dtype is torch.float32
            assert (p.grad.double().cpu() - e).norm() < 8 * rounding * e.norm() + rounding


# Streams ------------------------------------------------------------------------------------------

# Every kernel of both paths, in about a millisecond.
BUSY = dict(T=20, B=37, I=16, H=64, D=2)  # float32's weights fit 99 KB of shared memory
# Steps share sectors of 32 bytes with those before and after them, which run on other CTAs.
SHARED_SECTORS = dict(T=100, B=5, I=16, H=61, D=1)


def step_of_training(module, input):
    """[output, *final states, *gradients], none of them accumulated anywhere."""
    input = input.detach().requires_grad_()
    results = flat(module(input))
    leaves = [input, *module.parameters()]
    found = torch.autograd.grad(sum(r.square().sum() for r in results), leaves)
    return [*(r.detach() for r in results), *found]


def trained_module(kind="LSTM", dtype=torch.float32, shape=BUSY):
    module = build(modules, kind, shape["I"], shape["H"], bidirectional=shape["D"] == 2)
    return module.to(DEVICE, dtype)


def random_input(seed, dtype=torch.float32, shape=BUSY):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape["T"], shape["B"], shape["I"], generator=generator).to(DEVICE, dtype)


def keep_busy():
    """Some 20 ms of the current stream, in which the host runs far ahead."""
    torch.cuda._sleep(40_000_000)


@BOTH_PATHS
@pytest.mark.parametrize("kind", LAYERS)
def test_another_stream(kind, path, choose):
    """Work before and after the layer on its stream, and no synchronisation between."""
    choose(path)
    module, input = trained_module(kind), random_input(1)
    expected = step_of_training(module, input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ran(*TRAINED):
        late = torch.zeros_like(input)
        keep_busy()
        late.copy_(input)
        found = step_of_training(module, late)
        copies = [f.clone() for f in found]
        for tensor in (late, *found):  # not before all have read
            tensor.fill_(torch.nan)
    stream.synchronize()
    assert all(map(torch.equal, copies, expected))


@BOTH_PATHS
def test_the_memory_of_a_call_is_its_streams(path, choose):
    """The default stream overwrites what it frees while another is still to compute."""
    choose(path)
    module, input = trained_module(), random_input(1)
    expected = step_of_training(module, input)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        keep_busy()
        found = step_of_training(module, input)
    for _ in range(50):
        garbage = [torch.full((1 << n,), torch.nan, device=DEVICE) for n in range(10, 22)]
        del garbage
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


@BOTH_PATHS
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_two_streams_at_once(kind, path, choose):
    choose(path)
    module, inputs = trained_module(kind), [random_input(seed) for seed in (1, 2)]
    expected = [step_of_training(module, input) for input in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = [[], []]
    for _ in range(20):
        for stream, input, mine in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                mine.append(step_of_training(module, input))
    torch.cuda.synchronize()
    for mine, right in zip(found, expected, strict=True):
        for results in mine:
            assert all(map(torch.equal, results, right))


@BOTH_PATHS
@pytest.mark.parametrize("number", ["float32", "bfloat16"])
def test_beside_a_product_that_takes_the_whole_card(number, path, choose):
    choose(path)
    dtype = dtype_of(number)
    module, input = trained_module(dtype=dtype), random_input(1, dtype)
    expected = step_of_training(module, input)
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(100):
            torch.mm(a, a)
    found = [step_of_training(module, input) for _ in range(20)]
    torch.cuda.synchronize()
    for results in found:
        assert all(map(torch.equal, results, expected))


@BOTH_PATHS
def test_a_call_waits_for_nothing(path, choose):
    """No synchronisation of the host in a padded call, its backward included."""
    choose(path)
    module, input = trained_module(), random_input(1)
    mask = torch.rand(BUSY["T"], BUSY["B"], device=DEVICE) < 0.3
    step_of_training(module, input)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_of_training(module, input)
        with torch.no_grad():
            module(input, reset_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# Graphs -------------------------------------------------------------------------------------------


def captured(function):
    """(replay, what function() returned): each replay() overwrites the latter."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def assert_replays(function, input, values):
    """A graph of function() computes what function() does, whatever `input` holds."""
    replay, results = captured(function)
    for value in values:
        with torch.no_grad():
            input.copy_(value)
        replay()
        found = [r.clone() for r in results]
        for result in results:
            result.detach().fill_(torch.nan)  # each replay computes all of it
        expected = function()
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e)


@BOTH_PATHS
@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_graph(kind, number, path, choose):
    choose(path)
    dtype = dtype_of(number)
    module, input = trained_module(kind, dtype), random_input(1, dtype)
    values = [random_input(seed, dtype) for seed in (2, 3, 4)]

    @torch.no_grad()
    def forward():
        return flat(module(input))

    assert_replays(forward, input, values)
    assert_replays(lambda: step_of_training(module, input), input, values)


def test_graph_of_a_mask_that_changes(choose):
    choose("step")
    module, input = trained_module("GRU"), random_input(1)
    masks = [torch.rand(BUSY["T"], BUSY["B"], device=DEVICE) < p for p in (0.0, 0.3, 1.0)]
    mask = masks[0].clone()

    @torch.no_grad()
    def forward():
        return flat(module(input, reset_mask=mask))

    assert_replays(forward, mask, masks)


# Repetition and sizes -----------------------------------------------------------------------------


@BOTH_PATHS
@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_thousand_repetitions(kind, number, path, choose):
    choose(path)
    repeat(kind, number, BUSY)


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_tanh"])
def test_a_thousand_repetitions_of_steps_that_share_sectors(kind, number, choose):
    choose("step")
    repeat(kind, number, SHARED_SECTORS)


def repeat(kind, number, shape):
    dtype = dtype_of(number)
    module, input = trained_module(kind, dtype, shape), random_input(1, dtype, shape)
    expected = step_of_training(module, input)
    different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for f, e in zip(step_of_training(module, input), expected, strict=True):
            different += (f != e).sum()
    assert not different


@BOTH_PATHS
@pytest.mark.parametrize("number", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_of_one_keep_their_gradients(cell, number, path, choose):
    """16 bits hold such a gate as the -0 of -(1 - gate), whose sign a compiler could drop."""
    leaves, here, num_states, options = on_device(cell, number, dict(T=40, B=2, I=3, H=6, D=1))
    with torch.no_grad():
        for made in (leaves, here):
            made[-2].view(-1, 6)[1] += 25  # GRU's z, LSTM's forget gate
    choose(path, number)
    results, found = gradients(by_layer, here, num_states, options, cell)
    results, found = ([t.cpu() for t in tensors] for tensors in (results, found))
    assert_as_exact(number, cell, leaves, num_states, options, results, found)


@BOTH_PATHS
def test_no_memory_is_kept(path, choose):
    choose(path)
    module, input = trained_module(), random_input(1)
    step_of_training(module, input)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step_of_training(module, input)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize(("number", "path"), PATHS)
def test_short_sequences(number, path, cell, choose):
    for steps in (1, 2):
        check(choose, cell, number, path, dict(T=steps, B=19, I=5, H=50, D=2))


LONG = 100_000


@pytest.mark.parametrize(
    ("number", "path"), [("float64", "step"), ("float32", "step"), ("float32", "block")]
)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_long_sequences(cell, number, path, choose):
    """Against the CPU's kernels in float64: reference.py would take minutes."""
    leaves, num_states, options = problem(
        cell, T=LONG, B=2, I=2, H=8, D=1, packed=False, reset=None, dtype=torch.float64
    )
    with torch.no_grad():
        for leaf in leaves[1 + num_states :]:
            leaf.mul_(0.5)  # so that the past is forgotten, and with it its rounding
    choose(path)
    results, found = gradients(
        by_layer, moved([leaf.to(dtype_of(number)) for leaf in leaves]), num_states, options, cell
    )
    exact_results, exact = gradients(by_layer, leaves, num_states, options, cell)
    mine = errors([t.cpu() for t in (*results, *found)], [*exact_results, *exact])
    assert max(mine) < (1e-10 if number == "float64" else 1e-3)


@BOTH_PATHS
def test_more_gates_than_32_bits_can_count(path, choose):
    """Forward, with all that backward would need."""
    T, B, I, H = 4100, 2048, 8, 64  # noqa: E741
    assert T * B * 4 * H > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    choose(path)
    module = build(modules, "LSTM", I, H).to(DEVICE, torch.bfloat16)
    input = torch.randn(T, B, I, device=DEVICE, dtype=torch.bfloat16)
    try:
        with ran("kernel_forward"):
            output, (h_n, c_n) = module(input)
        some = [0, 1, 1000, B - 2, B - 1]
        with torch.no_grad():
            expected, (h, c) = module(input[:, some])
        close = dict(rtol=0, atol=16 * torch.finfo(torch.bfloat16).eps)
        torch.testing.assert_close(output[:, some], expected, **close)
        torch.testing.assert_close(h_n[:, some], h, **close)
        torch.testing.assert_close(c_n[:, some], c, **close)
    finally:
        output = h_n = c_n = input = None
        gc.collect()
        torch.cuda.empty_cache()


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@BOTH_PATHS
def test_a_device_that_is_not_the_current_one(path, choose):
    choose(path)
    module, input = trained_module(), random_input(1)
    expected = [t.cpu() for t in step_of_training(module, input)]
    second = torch.device("cuda", 1)
    with ran(*TRAINED):
        found = step_of_training(module.to(second), input.to(second))
    assert torch.cuda.current_device() == 0
    assert all(t.device == second for t in found)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.cpu(), e)
    stream = torch.cuda.Stream(second)
    stream.wait_stream(torch.cuda.current_stream(second))
    with torch.cuda.stream(stream):
        again = step_of_training(module, input.to(second))
    stream.synchronize()
    assert all(map(torch.equal, again, found))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("where", ["input", "hx", "weights", "all but the input"])
def test_tensors_of_several_devices_are_torchs_errors(kind, where):
    def call(namespace):
        module = build(namespace, kind, I, H)
        module.to("cpu" if where in ("weights", "all but the input") else DEVICE)
        input = torch.randn(T, B, I, device="cpu" if where == "input" else DEVICE)
        h0 = torch.zeros(1, B, H, device="cpu" if where in ("hx", "all but the input") else DEVICE)
        module(input, (h0, h0) if kind == "LSTM" else h0)

    with ran():
        ours, theirs = (raised(lambda n=n: call(n)) for n in (modules, nn))
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


# Without a path that is forced --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number", "batch", "size", "path"),
    [
        ("LSTM", "float16", 64, 512, "torch"),
        ("LSTM", "bfloat16", 64, 512, "step"),
        ("GRU", "float16", 64, 512, "step"),
        ("LSTM", "float16", 8, 64, "block"),
    ],
)
def test_what_the_table_chooses_runs_and_is_explained(kind, number, batch, size, path, choose):
    choose("")
    if path == "torch" and not cuda._is_large(DEVICE):
        pytest.skip("a smaller GPU than those that cuDNN has the kernel for")
    module = build(modules, kind, size, size).to(DEVICE, dtype_of(number))
    input = torch.randn(8, batch, size, device=DEVICE, dtype=dtype_of(number))
    said = fusedrnn.explain(module, input)
    assert said.startswith("torch.nn: ") if path == "torch" else f"{path} path: " in said
    with ran(*(("torch",) if path == "torch" else TRAINED)):
        module(input)[0].sum().backward()


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_torchs(kind):
    module = getattr(fusedrnn, kind)(I, H, device=DEVICE)
    expected = getattr(nn, kind)(I, H, device=DEVICE)
    expected.load_state_dict(module.state_dict())
    input = torch.randn(B, I, device=DEVICE)
    with ran("torch"):
        found = flat([module(input)])
    assert all(map(torch.equal, found, flat([expected(input)])))


# NVIDIA's checkers --------------------------------------------------------------------------------

SCRIPT = """
import torch
from test_cuda import PATHS, SHAPES, by_layer, dtype_of, gradients
from test_options import problem
from fusedrnn import cuda

torch.backends.cudnn.allow_tf32 = False
for number, cuda.forced in PATHS:
    torch.backends.cudnn.allow_tf32 = number == "tf32"
    shapes = [SHAPES["packed, boundaries"], SHAPES["weights in shared memory"]]
    cases = [("lstm", s) for s in shapes] + [("gru", shapes[0]), ("rnn_tanh", shapes[1])]
    cases += [("lstm", dict(T=2, B=9, I=2, H=20, P=9, D=2))] if cuda.forced == "step" else []
    for cell, shape in cases:
        shape = {"packed": False, "reset": None, **shape}
        leaves, states, options = problem(cell, dtype=dtype_of(number), **shape)
        if options.reset is not None:
            options = options._replace(reset=options.reset.cuda())
        leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
        gradients(by_layer, leaves, states, options, cell)
torch.cuda.synchronize()
print("all ran")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Of these kernels alone; torch's memory is not pooled, so that its ends are known."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # torch asks drivers for functions that they may not have
        command += ["--report-api-errors", "no"]
    command += ["--kernel-regex", "kns=fusedrnn", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "all ran" in done.stdout
