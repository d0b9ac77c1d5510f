"""The CUDA kernels against reference.py in float64, on the emulation of emulated.py: forward and
backward, both paths, every kind of number and every option; and that the emulation would notice if
a barrier were missing. On a GPU: test_cuda_device.py."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from emulated import emulated, module
from helpers import build, ran
from test_options import problem
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import LSTM, cuda, functional, ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBERS = ("float64", "float32", "tf32", "bfloat16", "float16")
PATHS = [(n, p) for n in NUMBERS for p in ("step", "block") if (n, p) != ("float64", "block")]

# Ugly sizes: tiles of 16 units, of 8 and of 32 rows, vectors of 2, 4 and 8 numbers.
SHAPES = {
    "one of each": dict(T=1, B=1, I=1, H=1, D=1),
    "aligned": dict(T=3, B=2, I=4, H=16, D=1),
    "aligned, packed": dict(T=5, B=19, I=3, H=24, D=2, packed=True),
    "two directions": dict(T=4, B=11, I=3, H=7, D=2),
    "packed": dict(T=5, B=9, I=3, H=33, D=2, packed=True),
    "boundaries": dict(T=5, B=3, I=3, H=17, D=2, reset="zero"),
    "packed, boundaries": dict(T=5, B=4, I=3, H=18, D=2, packed=True, reset="initial"),
    "many rows": dict(T=2, B=35, I=2, H=5, D=1),
    "weights in shared memory": dict(T=3, B=2, I=2, H=70, D=1),
}
PROJECTIONS = {
    "narrow": dict(T=3, B=3, I=5, H=20, P=9, D=2),
    "aligned": dict(T=4, B=10, I=3, H=24, P=16, D=2, packed=True, reset="initial"),
    "packed, boundaries": dict(T=4, B=10, I=5, H=21, P=17, D=2, packed=True, reset="initial"),
}


def dtype_of(number):
    return torch.float32 if number == "tf32" else getattr(torch, number)


def gradients(function, leaves, num_states, options, cell, grads=None):
    """(results, gradients of all leaves from all results)."""
    results = function(cell, leaves, num_states, options)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(r.shape, generator=generator).bfloat16() for r in results]
    found = torch.autograd.grad(
        results, leaves, [g.to(r) for g, r in zip(grads, results, strict=True)]
    )
    return [r.detach() for r in results], found


def by_layer(cell, leaves, num_states, options):
    n = 1 + num_states
    return functional.layer(cell, leaves[0], leaves[1:n], leaves[n:], options)


def by_reference(cell, leaves, num_states, options):
    n = 1 + num_states
    return reference.scan(cell, leaves[0], tuple(leaves[1:n]), leaves[n:], *options[:4])


def errors(found, exact):
    """Largest errors of each tensor, relative to its largest element or 1."""
    scale = [e.abs().max().clamp(min=1) for e in exact]
    return [
        ((f.double() - e).abs().max() / s).item()
        for f, e, s in zip(found, exact, scale, strict=True)
    ]


def allowed(number, plain, exact):
    """Errors that the kernels may have where the reference in the same dtype finds `plain`."""
    if number == "tf32":
        # Operands of 11 bits; products and sums are float32. No CPU computes so: an outer bound.
        return [8 * 2.0**-11] * len(exact)
    # float64's reference is the exact one itself, which the same sums in another order miss by 50
    # roundings and more (K = 331 and 512).
    least = (256 if number == "float64" else 16) * torch.finfo(dtype_of(number)).eps
    return [2 * e + least for e in errors(plain, exact)]


def assert_as_exact(number, cell, leaves, num_states, options, results, found, same_products=True):
    """`results` and the gradients `found` are as near to float64's as the reference's.

    same_products: with those outside the recurrence computed as the reference computes them.
    """
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_results, exact = gradients(by_reference, wide, num_states, options, cell)
    plain, same = gradients(by_reference, leaves, num_states, options, cell)
    mine = errors([*results, *found], [*exact_results, *exact])
    bounds = allowed(number, [*plain, *same], [*exact_results, *exact])
    if cell == "rnn_relu" and (number == "tf32" or not (same_products or number == "float64")):
        # Where relu's argument is about zero, rounding decides, and a gradient is any number: they
        # are near as a whole.
        bounds = bounds[: len(results)]
        for f, e in zip(found, exact, strict=True):
            assert (f.double() - e).norm() <= 0.3 * e.norm()
    for i, (error, bound) in enumerate(zip(mine, bounds, strict=False)):
        assert error <= bound, f"tensor {i}: {error:.1e}, allowed {bound:.1e}"


# Of several rows of tiles the step path takes wide ones where a GPU has as few as these.
FEW_MULTIPROCESSORS = 2


def check(cell, number, path, shape, seed=0, **more):
    """Results and gradients are as near to float64's as the reference's in the same dtype."""
    shape = {"packed": False, "reset": None, **shape}
    leaves, num_states, options = problem(cell, dtype=dtype_of(number), seed=seed, **shape)
    options = options._replace(**more)
    kernels = emulated(path, number == "tf32", seed, FEW_MULTIPROCESSORS)
    with kernels as runs, ran("kernel_forward", "kernel_backward"):
        results, found = gradients(by_layer, leaves, num_states, options, cell)
    assert [r for r in runs if r[0] != "previous"] == [
        ("forward", path == "block"),
        ("backward", path == "block"),
    ]
    assert_as_exact(number, cell, leaves, num_states, options, results, found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize(("number", "path"), PATHS)
def test_forward_and_backward(number, path, cell, shape):
    check(cell, number, path, SHAPES[shape])


@pytest.mark.parametrize("path", ["step", "block"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_long_sequences(cell, path):
    """More steps than one upload of offsets has, and several chunks of previous_states."""
    check(cell, "float32", path, dict(T=300, B=2, I=1, H=2, D=2, packed=True))


@pytest.mark.parametrize("shape", PROJECTIONS)
@pytest.mark.parametrize("number", NUMBERS)
def test_projection(number, shape):
    check("lstm", number, "step", PROJECTIONS[shape])


@pytest.mark.parametrize("path", ["step", "block"])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_other_schedules(cell, path):
    for seed in range(1, 6):
        check(cell, "float32", path, SHAPES["packed, boundaries"], seed=seed)


@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize("number", ["float64", "float32", "bfloat16"])
def test_gates_computed_again(number, cell):
    check(cell, number, "step", SHAPES["packed, boundaries"], recompute=True)


@pytest.mark.parametrize("shape", ["packed", "boundaries"])
@pytest.mark.parametrize("path", ["step", "block"])
def test_every_cell_state(path, shape):
    check("lstm", "float32", path, SHAPES[shape], cells=True)
    check("lstm", "float32", "step", PROJECTIONS["narrow"], cells=True, recompute=True)


@pytest.mark.parametrize("path", ["step", "block"])
@pytest.mark.parametrize("cell", ops.CELLS)
def test_without_gradients_the_same_bits(cell, path):
    """And no states, no biases, and only some gradients."""
    leaves, num_states, _ = problem(
        cell, T=3, B=3, I=2, H=9, D=2, packed=False, reset=None, dtype=torch.float32
    )
    input, weights = (
        leaves[0],
        [None if i % 4 > 1 else w for i, w in enumerate(leaves[1 + num_states :])],
    )
    with emulated(path):
        results = functional.layer(cell, input, (), weights)
        (grad,) = torch.autograd.grad(results[-1].sum(), [weights[1]])
        with torch.no_grad():
            again = functional.layer(cell, input, (), weights)
    assert all(map(torch.equal, results, again))
    results = functional.layer(cell, input, (), weights)
    (expected,) = torch.autograd.grad(results[-1].sum(), [weights[1]])
    torch.testing.assert_close(grad, expected)


def test_paths_agree_bit_for_bit_from_run_to_run():
    leaves, num_states, options = problem(
        "gru", T=4, B=11, I=3, H=33, D=2, packed=False, reset=None, dtype=torch.bfloat16
    )
    for path in ("step", "block"):
        runs = []
        for seed in (1, 2):
            with emulated(path, seed=seed):
                results, found = gradients(by_layer, leaves, num_states, options, "gru")
            runs.append([*results, *found])
        assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("number", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_near_one_keep_their_gradients(cell, recompute, number):
    """With 1 - z rounded to 0, all that GRU carries for long would be lost."""
    dtype, H = dtype_of(number), 6
    leaves, num_states, options = problem(
        cell, T=40, B=2, I=3, H=H, D=1, packed=False, reset=None, dtype=dtype
    )
    options = options._replace(recompute=recompute)
    with torch.no_grad():
        leaves[-2].view(-1, H)[1] += 6.5  # GRU's z, LSTM's forget gate
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_results, exact = gradients(by_reference, wide, num_states, options, cell)
    for path in ("step", "block"):
        with emulated(path):
            results, found = gradients(by_layer, leaves, num_states, options, cell)
        for f, e in zip([*results, *found], [*exact_results, *exact], strict=True):
            error = (f.double() - e).norm() / e.norm()
            assert error < 8 * torch.finfo(dtype).eps + 1e-4


@pytest.mark.parametrize("number", ["bfloat16", "float16"])
@pytest.mark.parametrize("path", ["step", "block"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_gates_of_one_keep_their_gradients(cell, path, number):
    """16 bits hold such a gate as the -0 of -(1 - gate)."""
    leaves, num_states, options = problem(
        cell, T=40, B=2, I=3, H=6, D=1, packed=False, reset=None, dtype=dtype_of(number)
    )
    with torch.no_grad():
        leaves[-2].view(-1, 6)[1] += 25  # GRU's z, LSTM's forget gate
    with emulated(path):
        results, found = gradients(by_layer, leaves, num_states, options, cell)
    assert_as_exact(number, cell, leaves, num_states, options, results, found)


@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.parametrize("number", NUMBERS)
def test_tiles_of_any_width_have_the_same_bits(number, cell):
    """Of 8, 16 and 32 rows, as few as fill the GPU."""
    leaves, num_states, options = problem(
        cell, T=3, B=19, I=3, H=24, D=2, packed=False, reset=None, dtype=dtype_of(number)
    )
    launches, runs = [], []
    for multiprocessors in (132, 8, FEW_MULTIPROCESSORS):
        with emulated("step", number == "tf32", multiprocessors=multiprocessors):
            results, found = gradients(by_layer, leaves, num_states, options, cell)
            launches.append(module().num_ctas())
        runs.append([*results, *found])
    widths = {8: 1, 4: 2, 2: 3}[dtype_of(number).itemsize]
    assert len(set(launches)) == widths
    for again in runs[1:]:
        assert all(map(torch.equal, again, runs[0]))


def test_gradients_from_unusual_tensors():
    """A batch of gradients at once, and a tensor whose sign is only noted: not for the kernels."""
    leaves, num_states, options = problem(
        "lstm", T=2, B=2, I=2, H=3, D=1, packed=False, reset=None, dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    with emulated():
        output = by_layer("lstm", leaves, num_states, options)[0]
        batch = torch.randn(3, *output.shape, dtype=torch.float64, generator=generator)
        (each,) = torch.autograd.grad(output, leaves[:1], batch, True, is_grads_batched=True)
        for one, grad in zip(each, batch, strict=True):
            (expected,) = torch.autograd.grad(output, leaves[:1], grad, True)
            torch.testing.assert_close(one, expected)
        (negative,) = torch.autograd.grad(output, leaves[:1], torch._neg_view(batch[0]), True)
        torch.testing.assert_close(negative, -each[0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("number", NUMBERS)
def test_initial_states_need_not_be_aligned(number, cell):
    leaves, num_states, options = problem(
        cell, T=2, B=3, I=2, H=16, D=2, packed=False, reset=None, dtype=dtype_of(number)
    )
    with emulated("step", number == "tf32"):
        expected = by_layer(cell, leaves, num_states, options)
    shifted = [torch.empty(s.numel() + 1, dtype=s.dtype)[1:].view_as(s) for s in leaves[1:]]
    for to, state in zip(shifted[:num_states], leaves[1:], strict=False):
        assert to.data_ptr() % 16
        to.data.copy_(state.detach())
    leaves[1 : 1 + num_states] = shifted[:num_states]
    with emulated("step", number == "tf32"), ran("kernel_forward"):
        found = by_layer(cell, leaves, num_states, options)
    assert all(map(torch.equal, found, expected))


def test_results_are_no_views():
    leaves, num_states, options = problem(
        "lstm", T=2, B=2, I=2, H=3, D=1, packed=False, reset=None, cells=True, dtype=torch.float32
    )
    with emulated():
        for result in by_layer("lstm", leaves, num_states, options):
            assert not result._is_view()
            torch.nn.functional.dropout(result, inplace=True)


def test_modules():
    """A stacked bidirectional LSTM with every option, through modules.py."""
    torch.manual_seed(0)
    ours = LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    theirs = torch.nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(4, 3, 3, dtype=torch.float64)
    with emulated() as runs, ran("kernel_forward", "kernel_backward"):
        output, _ = ours(input)
        output.square().sum().backward()
    assert [r[0] for r in runs].count("forward") == 2  # one call a layer, both directions inside
    expected, _ = theirs(input)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


MODULES = ("LSTM", "GRU", "RNN_tanh", "LSTM with projection")
FORMS = ("padded", "packed", "lengths", "reset_mask", "jagged", "unbatched")


def of_module(kind, form, device="cpu"):
    """Results and gradients of one with two layers and directions, called in one of FORMS."""
    name, _, projection = kind.partition(" ")
    sizes = {"proj_size": 3} if projection else {}
    module = build(
        fusedrnn, name, 3, 5, num_layers=2, bidirectional=True, dtype=torch.float64, **sizes
    ).to(device)
    module.recompute_gates = form == "padded"
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator).to(device)
    keywords = {}
    if form == "packed":
        input = pack_padded_sequence(input, [3, 6, 1, 6], enforce_sorted=False)
    elif form == "jagged":
        rows = [torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (3, 6, 1)]
        input = torch.nested.nested_tensor(rows, layout=torch.jagged, device=device)
    elif form == "unbatched":
        input = input[:, 0]
    elif form == "lengths":
        keywords = {"lengths": [3, 6, 0, 6]}
    elif form == "reset_mask":
        mask = torch.rand(6, 4, generator=generator) < 0.3
        keywords = {"reset_mask": mask.to(device), "reset_to_hx": True}
    output, state = module(input, **keywords)
    values = output.values() if form == "jagged" else getattr(output, "data", output)
    state = state if isinstance(state, tuple) else (state,)
    sum(r.square().sum() for r in (values, *state)).backward()
    return [t.cpu() for t in (values, *state, *(p.grad for p in module.parameters()))]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("form", FORMS)
def test_modules_as_on_the_cpu(kind, form):
    """Whatever the modules make of their options, both kernels get it."""
    expected = of_module(kind, form)
    with emulated() as runs:
        found = of_module(kind, form)
    assert [run[0] for run in runs].count("backward") == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("cell", "P"), [("lstm", 0), ("lstm", 2), ("gru", 0), ("rnn_tanh", 0), ("rnn_relu", 0)]
)
def test_gradcheck(cell, P):
    leaves, num_states, options = problem(
        cell, T=2, B=2, I=1, H=3, D=1, P=P, packed=True, reset="initial", dtype=torch.float64
    )
    with emulated():
        assert torch.autograd.gradcheck(
            lambda *t: by_layer(cell, t, num_states, options), leaves, fast_mode=True
        )


def test_what_runs_on_a_gpu_only(monkeypatch):
    """Some of test_cuda_device.py, here: a mistake in a test that no GPU has run is seen."""
    import test_cuda_device as device

    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    with ExitStack() as kernels:

        def choose(path, number="float32"):
            kernels.close()
            kernels.enter_context(emulated(path, number == "tf32"))

        for cell in ops.CELLS:
            for number, path in (("float32", "block"), ("tf32", "step")):
                device.test_forward_and_backward(number, path, cell, SHAPES["boundaries"], choose)
        device.test_every_cell_state("packed", "step", choose)
        for kind in ("LSTM", "RNN_relu"):
            for number, path in (("float32", "block"), ("float16", "step")):
                device.test_modules(
                    number, path, kind, "layers and directions", choose, monkeypatch
                )
        device.test_modules("bfloat16", "step", "LSTM", "projection", choose, monkeypatch)
        device.test_gates_of_one_keep_their_gradients("lstm", "float16", "block", choose)
        device.test_double_backward("gru", choose)
        device.test_torch_func(choose)


# The choice of a path ----------------------------------------------------------------------------


def layer_of(H, B=8, dtype=torch.bfloat16, cell="lstm", D=1):
    leaves, num_states, options = problem(
        cell, T=1, B=B, I=1, H=H, D=D, packed=False, reset=None, dtype=dtype
    )
    n = 1 + num_states
    return cuda._Layer(cell, leaves[0], leaves[1:n], leaves[n:], options)


@pytest.mark.parametrize(
    ("H", "dtype", "forward", "backward"),
    [
        (128, torch.bfloat16, True, True),
        (192, torch.bfloat16, True, False),  # the gates' gradients take more room than h
        (208, torch.bfloat16, False, False),
        (112, torch.float32, True, True),
        (128, torch.float32, False, False),
        (16, torch.float64, False, False),
    ],
)
def test_small_layers_take_the_block_path(H, dtype, forward, backward):
    with emulated():
        layer = layer_of(H, dtype=dtype)
        assert [layer.block(False), layer.block(True)] == [forward, backward]


def test_large_batches_take_the_step_path():
    with emulated():
        ctas = layer_of(64).block_ctas(False)
        assert ctas >= 132
        assert layer_of(64, B=8 * 2 * ctas).choice().path == "block"
        assert layer_of(64, B=8 * 2 * ctas + 1).choice().path == "step"
        assert layer_of(64, B=8 * ctas + 1, D=2).choice().path == "step"


def test_smaller_multiprocessors_take_fewer_layers():
    with emulated():  # which sets the device back
        module().set_device(8, 6, 82, 99 * 1024)
        assert layer_of(96).block(False)
        assert not layer_of(160).block(False)


def test_forced_path_that_cannot_be():
    with (
        emulated("block"),
        pytest.raises(RuntimeError, match="there is none for H = 208, P = 208 in"),
    ):
        layer_of(208).block(False)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_in_older_torch(allowed, monkeypatch):
    """Before 2.9 cudnn.rnn is a module without the setting, or not imported yet."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    for rnn in (None, SimpleNamespace()):
        monkeypatch.setattr(torch.backends.cudnn, "rnn", rnn, raising=False)
        assert cuda._tf32() == allowed


def test_cudnn_is_asked_for_what_it_can_do():
    assert cuda.cudnn_takes(True)
    assert not cuda.cudnn_takes(False)  # backward
    with torch.no_grad():
        assert cuda.cudnn_takes(False)
    with torch.backends.cudnn.flags(enabled=False):
        assert not cuda.cudnn_takes(True)


@pytest.mark.parametrize(
    ("hip", "capability", "driver", "reason"),
    [
        (None, (9, 0), 13000, None),
        (None, (9, 0), 12080, "built with CUDA 13.0.88, and the driver is for 12.8"),
        (None, (7, 5), 13000, "sm_80 and later"),
        ("6.4", (9, 4), 60400, "NVIDIA"),
    ],
)
def test_gpus_and_drivers_that_no_kernel_runs_on(hip, capability, driver, reason, monkeypatch):
    extension = SimpleNamespace(CudaLayer=None, cuda_version="13.0.88")
    monkeypatch.setattr(cuda, "_C", extension)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    found = cuda.unavailable.__wrapped__(torch.device("cuda"))
    assert found is None if reason is None else reason in found


def test_torch_can_be_asked_for():
    module = LSTM(2, 3)
    with emulated("torch"), ran("torch"):
        module(torch.randn(2, 2, 2))


def test_cudnn_where_it_is_known_to_be_faster(monkeypatch):
    monkeypatch.setattr(cuda, "_is_large", lambda device: True)
    call = cuda._Call("lstm", torch.float16, torch.device("cuda"), 64, 512, 512, 1, True, lambda: 0)

    def path(**changed):
        return next(r.path for r in cuda.TABLE if r.applies(call._replace(**changed)))

    assert path() == "torch"
    for changed in (
        {"dtype": torch.bfloat16},
        {"D": 2},
        {"cell": "gru"},
        {"H": 500},
        {"I": 100},
        {"B": 20},
        {"B": 136},
        {"H": 1152},
        {"alone": False},
        {"cell": "rnn_tanh", "B": 96, "H": 1024},
    ):
        assert path(**changed) == "step"

    input, weights = torch.empty(2, 64, 512), [torch.empty(2048, 512)] * 2 + [None] * 2
    assert cuda.torch_is_faster("lstm", torch.float16, input, weights)
    assert not cuda.torch_is_faster("lstm", torch.bfloat16, input, weights)
    assert not cuda.torch_is_faster("lstm", torch.float16, input, weights * 2)
    monkeypatch.setattr(cuda, "forced", "step")
    assert not cuda.torch_is_faster("lstm", torch.float16, input, weights)


# The emulation notices what is missing -----------------------------------------------------------


def suite():
    """One case for each kernel and each kind of exchange between threads."""
    for path, number in (("step", "float32"), ("block", "float32"), ("block", "bfloat16")):
        check("lstm", number, path, SHAPES["packed, boundaries"])
        check("gru", number, path, SHAPES["weights in shared memory"])
    check("lstm", "float32", "step", PROJECTIONS["narrow"])


def test_each_barrier_is_needed():
    suite()
    sites = module().sites()
    files = {site.rpartition("/")[2].partition(":")[0] for site in sites}
    assert files == {"step.cuh", "block.cuh"}
    try:
        for site in sites:
            module().disable_site(site)
            try:
                suite()
            except (AssertionError, RuntimeError):
                continue
            pytest.fail(f"nothing fails without {site}")
    finally:
        module().disable_site(None)
    suite()


def test_accesses_outside_are_noticed():
    leaves, num_states, options = problem(
        "lstm", T=2, B=2, I=2, H=4, D=1, packed=False, reset=None, dtype=torch.float32
    )
    n = 1 + num_states
    with emulated("step"), torch.no_grad():
        real = cuda._Layer.empty
        cut = {"left": 1}

        def short(self, *shape, dtype=None):
            tensor = real(self, *shape, dtype=dtype)
            if shape == (2, 2, 4) and cut["left"]:  # the output, one step too short
                cut["left"] = 0
                return tensor[:-1].clone()
            return tensor

        cuda._Layer.empty = short
        try:
            with pytest.raises(RuntimeError, match="not within any memory"):
                functional.layer("lstm", leaves[0], leaves[1:n], leaves[n:], options)
        finally:
            cuda._Layer.empty = real
