"""The short way of a module's plainest calls, ops.plain: which calls go it, and that they get the
bits of the long way. Not what the kernels compute."""

import threading

import pytest
import torch
from helpers import CELLS, LAYERS, build, flat, matmul_precision, pair, raised, ran, states
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn import modules, ops

I, H, T, B = 5, 7, 6, 3  # noqa: E741
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("kernels_only")


@pytest.fixture
def plain(monkeypatch):
    """Whether each call of ops.plain gave results, in turn."""
    gave = []
    function = ops.plain

    def spy(*arguments):
        results = function(*arguments)
        gave.append(results is not None)
        return results

    monkeypatch.setattr(ops, "plain", spy)
    return gave


def arguments(kind, batch=B, dtype=torch.float32, of_hx=1):
    one_step = kind in CELLS
    generator = torch.Generator().manual_seed(1)
    shape = (batch, I) if one_step else (T, batch, I)
    of_state = (batch, H) if one_step else (of_hx, batch, H)
    return torch.randn(shape, dtype=dtype, generator=generator), states(
        kind, *of_state, dtype=dtype
    )


def assert_torchs(ours, theirs, *arguments):
    """Without gradients both give the same, but for roundings."""
    with torch.no_grad():
        for a, b in zip(flat(ours(*arguments)), flat(theirs(*arguments)), strict=True):
            torch.testing.assert_close(a, b)


# Options of a module that goes it, and the first size of its hx.
GOES = [
    ({}, 1),
    ({"bidirectional": True}, 2),
    ({"bias": False}, 1),
    ({"num_layers": 3}, 3),
    ({"num_layers": 2, "bidirectional": True, "bias": False}, 4),
]


@pytest.mark.parametrize("hx", ["none", "given"])
@pytest.mark.parametrize("batch", [1, B, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_has_the_bits_of_the_long_way(kind, dtype, batch, hx, plain, monkeypatch):
    for options, of_hx in GOES[:1] if kind in CELLS else GOES:
        module = build(modules, kind, I, H, dtype=dtype, **options)
        input, given = arguments(kind, batch, dtype, of_hx)
        given = given if hx == "given" else None
        counted = ops.counts["kernel_forward"]
        with torch.no_grad(), ran("kernel_forward"):
            short = module(input, given)
        assert ops.counts["kernel_forward"] - counted == options.get("num_layers", 1)
        assert plain == [True]
        plain.clear()
        with monkeypatch.context() as patch, torch.no_grad(), ran("kernel_forward"):
            patch.setattr(ops, "plain", lambda *_: None)
            long = module(input, given)
        assert type(short) is type(long)
        for a, b in zip(flat(short), flat(long), strict=True):
            assert a.dtype is dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_follows_the_matmul_precision(kind, batch, precision, plain, monkeypatch):
    module = build(modules, kind, 40, 40)
    input = torch.randn((batch, 40) if kind in CELLS else (T, batch, 40))
    with matmul_precision(precision), torch.no_grad():
        short = module(input)
        assert plain.pop()
        monkeypatch.setattr(ops, "plain", lambda *_: None)
        assert all(map(torch.equal, flat(short), flat(module(input))))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_forward_mode(call):
    with forward_ad.dual_level():
        call()


def watched_by(context):
    def go(call):
        with context():
            call()

    return go


WATCHERS = {
    "gradients": watched_by(torch.enable_grad),
    "autocast": watched_by(lambda: torch.autocast("cpu")),
    "forward mode": in_forward_mode,
    "dispatch mode": watched_by(Mode),
    "profiler": watched_by(torch.autograd.profiler.profile),
    "functorch": lambda call: torch.func.vmap(lambda _: (call(), torch.zeros(()))[1])(
        torch.zeros(2)
    ),
}


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell_relu"])
def test_does_not_hide_from_who_watches(kind, watcher, plain):
    module = build(modules, kind, I, H)
    input, hx = arguments(kind)
    with torch.no_grad():
        WATCHERS[watcher](lambda: module(input, hx))
    assert plain == ([] if watcher == "gradients" else [False])


def test_is_hidden_from_while_tracing(plain):
    module = build(modules, "LSTM", I, H)
    input, hx = arguments("LSTM")
    with torch.no_grad():
        torch.jit.trace(module, (input, hx), check_trace=False)
    assert not any(plain)


@pytest.mark.parametrize("kind", ["LSTM", "RNN_tanh", "GRUCell"])
def test_weights_that_are_no_parameters_go_the_long_way(kind, plain):
    suffix = "" if kind in CELLS else "_l0"
    for change in (
        lambda m: parametrizations.weight_norm(m, "weight_hh" + suffix),
        lambda m: prune.random_unstructured(m, "weight_ih" + suffix, amount=0.3),
    ):
        theirs, ours = pair(kind, I, H)
        torch.manual_seed(4)
        change(theirs)
        torch.manual_seed(4)
        change(ours)
        input, hx = arguments(kind)
        assert_torchs(ours, theirs, input, hx)
        assert plain == [False]
        plain.clear()


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_goes_the_long_way(kind, plain):
    theirs, ours = pair(kind, I, H, num_layers=2, dropout=0.5)
    input, _ = arguments(kind)
    for training in (True, False):
        for module in (theirs, ours):
            module.train(training)
        results = []
        for module in (theirs, ours):
            torch.manual_seed(0)
            with torch.no_grad():
                results.append(flat(module(input)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert plain == [True]  # without training


@pytest.mark.parametrize("kind", LAYERS)
def test_the_states_of_layers_may_be_views(kind, plain):
    theirs, ours = pair(kind, I, H, num_layers=2, bidirectional=True)
    input, hx = arguments(kind, of_hx=5)
    hx = tuple(s[1:] for s in hx) if isinstance(hx, tuple) else hx[1:]
    assert_torchs(ours, theirs, input, hx)
    hx = torch.utils._pytree.tree_map(lambda s: s.transpose(1, 2).contiguous().transpose(1, 2), hx)
    assert_torchs(ours, theirs, input, hx)
    assert plain == [True, True]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("hx", ["none", "given"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(B, T), (1, T), (B, 1), (1, 1), (0, T)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_batch_first_goes_it(kind, shape, dtype, hx, layers, plain, monkeypatch):
    options = {"num_layers": layers, "batch_first": True, "bidirectional": True}
    module = build(modules, kind, I, H, dtype=dtype, **options)
    wide = torch.randn(*shape, I + 1, dtype=dtype)
    given = states(kind, 2 * layers, shape[0], H, dtype=dtype) if hx == "given" else None
    inputs = [wide[..., 1:], wide[..., 1:].clone()]
    inputs.append(torch.randn(*shape[::-1], I, dtype=dtype).transpose(0, 1))
    with torch.no_grad():
        short = [module(input, given) for input in inputs]
        assert plain == [True] * len(inputs)
        monkeypatch.setattr(ops, "plain", lambda *_: None)
        for input, results in zip(inputs, short, strict=True):
            expected = module(input, given)
            assert all(map(torch.equal, flat(results), flat(expected)))
            assert results[0].is_contiguous() == expected[0].is_contiguous()


def test_a_projection_goes_it(plain):
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "bias": False}):
        theirs, ours = pair("LSTM", I, H, proj_size=3, **options)
        input, _ = arguments("LSTM")
        assert_torchs(ours, theirs, input)
    assert plain == [True] * 3


def unbatched(kind, options, dtype):
    """input and hx without a dimension for the batch."""
    step = kind in CELLS
    input = torch.randn(*[T] * (not step), I, dtype=dtype)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    sizes = [options.get("proj_size") or H, H]
    hx = [torch.randn(*[rows] * (not step), size, dtype=dtype) for size in sizes]
    return input, tuple(hx) if kind.startswith("LSTM") else hx[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in LAYERS + CELLS),
        *((kind, {"num_layers": 2, "bidirectional": True}) for kind in LAYERS),
        *((kind, {"num_layers": 2, "batch_first": True}) for kind in LAYERS),
        ("LSTM", {"num_layers": 2, "proj_size": 3}),
    ],
    ids=str,
)
def test_an_unbatched_input_goes_it(kind, options, dtype, plain, monkeypatch):
    module = build(modules, kind, I, H, dtype=dtype, **options)
    input, hx = unbatched(kind, options, dtype)
    calls = [(input,), (input, hx), (input.repeat_interleave(2, -1)[..., ::2], hx)]
    with torch.no_grad():
        short = [module(*call) for call in calls]
        assert plain == [True] * len(calls)
        monkeypatch.setattr(ops, "plain", lambda *_: None)
        for call, results in zip(calls, short, strict=True):
            for a, b in zip(flat(results), flat(module(*call)), strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()


def test_a_step_is_of_one_layer_in_one_direction():
    cell = build(modules, "GRUCell", I, H)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    with torch.no_grad():
        for batch_first, layers, directions in [
            (False, 1, 1),
            (True, 1, 1),
            (False, 2, 1),
            (False, 1, 2),
        ]:
            sizes = (I, H, layers, 4)
            args = (batch_first, sizes, cell._parameters, names * layers * directions, None)
            result = ops.plain("gru", True, *args, torch.randn(B, I), None, None)
            assert (result is not None) == (not batch_first and layers == directions == 1)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_states_of_a_batch_and_an_unbatched_input_have_torchs_errors(kind, plain):
    theirs, ours = pair(kind, I, H)
    input, _ = unbatched(kind, {}, torch.float32)
    _, hx = arguments(kind)
    with torch.no_grad():
        expected, ours_raised = (raised(lambda m=m: m(input, hx)) for m in (theirs, ours))
    assert (type(ours_raised), str(ours_raised)) == (type(expected), str(expected))
    assert plain == [False]


WRONG = {
    "features": lambda kind, input, hx: (input[..., 1:], hx),
    "batch": lambda kind, input, hx: (input.repeat_interleave(2, -2), hx),
    "dtype": lambda kind, input, hx: (input.double(), hx),
    "an empty hx": lambda kind, input, hx: (input, ()),
    "one state of two": lambda kind, input, hx: (input, hx[:1] if isinstance(hx, tuple) else (hx,)),
    "no tensor": lambda kind, input, hx: ([1.0], hx),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_wrong_arguments_have_torchs_errors(kind, wrong, plain):
    theirs, ours = pair(kind, I, H)
    arguments_ = WRONG[wrong](kind, *arguments(kind))
    with torch.no_grad():
        assert type(raised(lambda: ours(*arguments_))) is type(raised(lambda: theirs(*arguments_)))
    assert not any(plain)


def test_a_later_layers_wrong_weight_has_torchs_error(plain):
    theirs, ours = pair("GRU", I, H, num_layers=2)
    for module in (theirs, ours):
        module.weight_ih_l1 = nn.Parameter(torch.randn(3 * H, H + 1))
    input, _ = arguments("GRU")
    with torch.no_grad():
        assert type(raised(lambda: ours(input))) is type(raised(lambda: theirs(input)))
    assert plain == [False]


@pytest.mark.parametrize("size", [2, 5])
def test_a_later_layers_other_projection_has_torchs_error(size, plain):
    theirs, ours = pair("LSTM", I, H, num_layers=2, proj_size=3)
    for module in (theirs, ours):
        module.weight_hh_l1 = nn.Parameter(torch.randn(4 * H, size))
        module.weight_hr_l1 = nn.Parameter(torch.randn(size, H))
    input, _ = arguments("LSTM")
    with torch.no_grad():
        assert type(raised(lambda: ours(input))) is type(raised(lambda: theirs(input)))
    assert plain == [False]


def test_input_size_is_that_of_the_module(plain):
    # torch.nn asks the attribute and not the weights.
    theirs, ours = pair("LSTM", I, H)
    input = torch.randn(T, B, I + 1)
    for module in (theirs, ours):
        module.weight_ih_l0 = nn.Parameter(torch.randn(4 * H, I + 1))
    with torch.no_grad():
        assert str(raised(lambda: ours(input))) == str(raised(lambda: theirs(input)))
    assert plain == [False]


ATTRIBUTES = {
    "overwritten flat weights": lambda m: setattr(
        m, "_flat_weights", [torch.zeros_like(w) for w in m._flat_weights]
    ),
    "no biases": lambda m: setattr(m, "bias", False),
    "one bias less": lambda m: setattr(m, "bias_ih_l0", None),
    "two directions": lambda m: setattr(m, "bidirectional", True),
    "input_size a float": lambda m: setattr(m, "input_size", float(I)),
    "hidden_size a float": lambda m: setattr(m, "hidden_size", float(H)),
    "input_size too large": lambda m: setattr(m, "input_size", 2**80),
    "two layers": lambda m: setattr(m, "num_layers", 2),
    "no layers": lambda m: setattr(m, "num_layers", 0),
}


def outcome(module, *arguments):
    """The tensors that the module gives, or the type of what it raises."""
    try:
        with torch.no_grad():
            return flat(module(*arguments))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("change", ATTRIBUTES)
@pytest.mark.parametrize("kind", LAYERS)
def test_attributes_that_were_changed_go_the_long_way(kind, change, plain):
    theirs, ours = pair(kind, I, H)
    ATTRIBUTES[change](theirs)
    ATTRIBUTES[change](ours)
    input, hx = arguments(kind)
    actual, expected = outcome(ours, input, hx), outcome(theirs, input, hx)
    assert not any(plain)
    if isinstance(expected, type):
        assert actual is expected
    else:
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_sizes_of_cells_may_be_floats(plain):
    theirs, ours = pair("GRUCell", I, H)
    theirs.input_size = ours.input_size = float(I)
    input, hx = arguments("GRUCell")
    assert_torchs(ours, theirs, input, hx)
    assert plain == [False]


def test_batch_first_may_be_any_truth(plain):
    module = build(modules, "LSTM", I, H, batch_first=True)
    input = torch.randn(4, 1, I)
    with torch.no_grad():
        expected = module(input)
        module.batch_first = 1
        assert all(map(torch.equal, flat(module(input)), flat(expected)))
    assert plain == [True, True]


def test_weights_may_be_replaced_meanwhile(plain):
    """The call holds its own: those that another thread takes away are freed after it."""
    size = 512  # 4 MB, read as they lie
    module = build(modules, "LSTM", size, size)
    input, hx = torch.randn(1, 1, size), states("LSTM", 1, 1, size, dtype=torch.float32)
    weights = [module.weight_hh_l0.detach().clone(), -module.weight_hh_l0.detach()]
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            for weight in weights:
                module.weight_hh_l0 = nn.Parameter(weight.clone())

    thread = threading.Thread(target=replace)
    expected = []
    with torch.no_grad():
        for weight in weights:
            module.weight_hh_l0 = nn.Parameter(weight)
            expected.append(module(input, hx)[0])
        thread.start()
        try:
            for _ in range(300):
                output = module(input, hx)[0]
                assert any(torch.equal(output, e) for e in expected)
        finally:
            stop.set()
            thread.join()
    assert any(plain[2:])
