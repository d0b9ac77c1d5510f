"""Autocast on the CPU: who computes, the dtypes of torch.nn's results, and errors against float64
that are no larger than torch.nn's."""

import pytest
import torch
from helpers import CELLS, LAYERS, build, flat, pair, raised, ran, states
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import functional, modules

T, B, I, H = 6, 3, 5, 7  # noqa: E741
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOW = pytest.mark.parametrize("low", [BF16, F16], ids=str)
TRAINED = ("kernel_forward", "kernel_backward")


pytestmark = pytest.mark.usefixtures("one_thread", "kernels_only")


def input_of(kind, dtype=F32):
    generator = torch.Generator().manual_seed(1)
    lead = (T, B) if kind in LAYERS else (B,)
    return torch.randn(*lead, I, generator=generator).to(dtype)


def hx_of(kind, dtype, layers=1):
    if dtype is None:
        return None
    made = states(kind, *((layers, B) if kind in LAYERS else (B,)), H, dtype=F32)
    return tuple(s.to(dtype) for s in made) if isinstance(made, tuple) else made.to(dtype)


def run_under(low, module, input, hx, train=True):
    """[results, then gradients of (input, *hx, *weights)] of a forward pass under autocast.

    The gradients of the results are small integers, which every dtype holds exactly. low None: no
    autocast, and all in float64.
    """
    given = [t if low else t.double() for t in flat(input, hx)]
    leaves = [t.clone().requires_grad_(train) for t in given]
    arguments = leaves[:1]
    if hx is not None:
        arguments.append(leaves[1] if len(leaves) == 2 else tuple(leaves[1:]))
    with torch.autocast("cpu", low or BF16, enabled=low is not None), torch.set_grad_enabled(train):
        results = flat(module(*arguments))
    if not train:
        return results
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randint(-2, 3, r.shape, generator=generator).to(r.dtype) for r in results]
    leaves += module.parameters()
    return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, grads)]


def rule(kind, low, input_dtype, hx_dtype):
    """The documented dtype of the results."""
    if kind.startswith("RNN") or kind == "LSTM":
        return low
    return torch.promote_types(low, hx_dtype or input_dtype)


def assert_at_least_as_exact(actual, expected, exact, low):
    """Twice the error of `expected` and a rounding; without `expected`, roundings alone."""
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        error = (a.double() - e).norm()
        if expected is None:
            allowed = 2 * max(torch.finfo(low).eps, torch.finfo(a.dtype).eps) * e.norm()
        else:
            assert a.dtype == expected[i].dtype
            allowed = 2 * (expected[i].double() - e).norm() + torch.finfo(a.dtype).eps * e.norm()
        assert error <= allowed, (i, error, allowed)


# The dtypes of (weights, input, hx); "low" is autocast's and "other" the other 16-bit one.
CASES = {
    "float32": (F32, F32, None),
    "float32 hx": (F32, F32, F32),
    "low hx": (F32, F32, "low"),
    "other hx": (F32, F32, "other"),
    "low input": (F32, "low", None),
    "low input, float32 hx": (F32, "low", F32),
    "other input": (F32, "other", None),
    "low weights": ("low", F32, None),
    "low weights, input and hx": ("low", "low", "low"),
    "all other": ("other", "other", None),
}


@LOW
@pytest.mark.parametrize("train", [True, False], ids=["train", "no_grad"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_table_of_dtypes(kind, case, train, low):
    names = {"low": low, "other": F16 if low is BF16 else BF16}
    weights, input_dtype, hx_dtype = (names.get(d, d) for d in CASES[case])
    theirs, ours = (m.to(weights) for m in pair(kind, I, H))
    input, hx = input_of(kind, input_dtype), hx_of(kind, hx_dtype)
    with ran(*TRAINED if train else TRAINED[:1]):
        actual = run_under(low, ours, input, hx, train)
    results = 2 - (kind in CELLS) + kind.startswith("LSTM")
    assert {t.dtype for t in actual[:results]} == {rule(kind, low, input_dtype, hx_dtype)}
    leaves = [*flat(input, hx), *ours.parameters()] if train else []
    assert [g.dtype for g in actual[results:]] == [leaf.dtype for leaf in leaves]

    try:
        expected = run_under(low, theirs, input, hx, train)
    except RuntimeError:  # oneDNN's LSTM, on a CPU without that dtype
        assert kind == "LSTM"
        expected = None
    if kind == "LSTM" and F16 in (low, input_dtype):  # torch has no rule for it
        expected = None
    exact = run_under(None, theirs.double(), input, hx, train)
    assert_at_least_as_exact(actual, expected, exact, low)


@LOW
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_directions_and_dropout(kind, low):
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.4, "batch_first": True}
    theirs, ours = pair(kind, I, H, **options)
    input, hx = input_of(kind).transpose(0, 1), hx_of(kind, F32, 6)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)  # the same elements drop out
        with torch.autocast("cpu", low):
            if module is theirs and kind == "LSTM" and low is F16:
                module.double()  # torch's raises
                input, hx = input.double(), tuple(s.double() for s in hx)
            results.append(flat(module(input, hx)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype or expected.dtype == F64
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02, check_dtype=False)


@LOW
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_backward_inside_and_outside_gives_the_same_bits(kind, low):
    module = build(modules, kind, I, H)
    input = input_of(kind).requires_grad_()
    leaves = (input, *module.parameters())
    with torch.autocast("cpu", low):
        inside = torch.autograd.grad(flat(module(input))[0].float().square().sum(), leaves)
        loss = flat(module(input))[0].float().square().sum()
    outside = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, inside, outside))


@LOW
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_checkpoint_recomputes_under_autocast(kind, reentrant, low):
    module = build(modules, kind, I, H)
    input = input_of(kind).requires_grad_()

    def gradients(call):
        module.zero_grad()
        with torch.autocast("cpu", low):
            result = flat(call(input))[0]
        assert result.dtype == rule(kind, low, F32, None)
        input.grad = None
        result.float().square().sum().backward()
        return [input.grad, *(p.grad for p in module.parameters())]

    expected = gradients(module)
    with ran(*TRAINED):
        actual = gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_second_derivatives(kind):
    def second(module, input, low):
        input = input.clone().requires_grad_()
        with torch.autocast("cpu", BF16, enabled=low):
            result = flat(module(input))[0]
        grads = torch.autograd.grad(
            result.to(input.dtype).sum(), [input, *module.parameters()], create_graph=True
        )
        loss = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(loss, [input, *module.parameters()], materialize_grads=True)

    module = build(modules, kind, I, H)
    with ran("kernel_forward", "reference"):
        actual = second(module, input_of(kind), True)
    for a, e in zip(actual, second(module.double(), input_of(kind).double(), False), strict=True):
        assert (a.double() - e).norm() <= 1e-2 * e.norm() + 1e-6


@LOW
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_disabled_inside_is_no_autocast(kind, low):
    module, input = build(modules, kind, I, H), input_of(kind)
    expected = flat(module(input))
    with torch.autocast("cpu", low), torch.autocast("cpu", enabled=False), ran("kernel_forward"):
        actual = flat(module(input))
    assert all(map(torch.equal, actual, expected))


@LOW
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_float64_stays_as_it_is(kind, low):
    theirs, ours = pair(kind, I, H, dtype=F64)
    input, hx = input_of(kind, F64), hx_of(kind, F64)
    expected = flat(ours(input, hx))
    with torch.autocast("cpu", low):
        with ran("kernel_forward"):
            actual = flat(ours(input, hx))
        assert flat(theirs(input, hx))[0].dtype == F64
    assert all(map(torch.equal, actual, expected))


@LOW
@pytest.mark.parametrize("dtypes", [(F32, F64, None), (F32, F32, F64), (F64, F32, None)], ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_what_autocast_does_not_convert_raises_as_in_torch(kind, dtypes, low):
    weights, input_dtype, hx_dtype = dtypes
    calls = [
        lambda m: m(input_of(kind, input_dtype), hx_of(kind, hx_dtype)),
        lambda m: m(input_of(kind, torch.int64)),
    ]
    theirs, ours = (m.to(weights) for m in pair(kind, I, H))
    for call in calls:
        with torch.autocast("cpu", low), ran():
            assert type(raised(lambda c=call: c(ours))) is type(raised(lambda c=call: c(theirs)))


@LOW
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_weights_changed_inside_are_the_ones_used(kind, cached, low):
    """torch's cache of converted weights must not serve old ones."""
    module, input = build(modules, kind, I, H), input_of(kind)
    with torch.autocast("cpu", low, cache_enabled=cached):
        before = flat(module(input))[0]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2)
        after = flat(module(input))[0]
        after.float().sum().backward()
    with torch.autocast("cpu", low):
        assert torch.equal(flat(module(input))[0], after)
    assert not torch.equal(before, after)
    assert all(p.grad.dtype == F32 for p in module.parameters())


@LOW
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_have_the_dtypes_of_torch(kind, low):
    packed = pack_sequence([input_of(kind)[:, 0], input_of(kind)[:-2, 1]])
    with torch.autocast("cpu", low):
        expected, actual = ([o.data, *flat(s)] for o, s in (m(packed) for m in pair(kind, I, H)))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.02)


@LOW
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_functional_layers(cell, low):
    kind = cell.upper() if cell in ("lstm", "gru") else cell.replace("rnn", "RNN")
    module = build(modules, kind, I, H)
    with torch.autocast("cpu", low):
        expected = flat(module(input_of(kind)))
        with ran("kernel_forward"):
            actual = functional.layer(cell, input_of(kind), (), list(module.parameters()))
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert all(map(torch.equal, actual, expected))


@LOW
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_the_kernels_refuse_late(kind, low):
    """It has to be the reference's, because dropout has drawn its numbers, in the same dtype."""
    module, twin = (build(modules, kind, I, H, 2, dropout=0.5) for _ in range(2))
    module.weight_hh_l1.data = torch._neg_view(module.weight_hh_l1.data.neg())
    results = []
    for one, computed in ((module, ("kernel_forward", "reference")), (twin, ("kernel_forward",))):
        torch.manual_seed(0)
        with torch.autocast("cpu", low), ran(*computed):
            results.append(flat(one(input_of(kind), hx_of(kind, F32, 2))))
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_autocast_of_another_device_changes_nothing(kind):
    module, input = build(modules, kind, I, H), input_of(kind)
    expected = flat(module(input))
    torch.set_autocast_enabled("cuda", True)
    try:
        with ran("kernel_forward"):
            actual = flat(module(input))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert all(map(torch.equal, actual, expected))


@LOW
@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_else_watches_is_left_to_torch(kind, low):
    theirs, ours = (m.requires_grad_(False) for m in pair(kind, I, H))
    input = input_of(kind)
    if kind == "LSTM" and low is F16:
        pytest.skip("torch's raises")
    with torch.autocast("cpu", low):
        expected = flat(theirs(input))[0]
        with ran("torch"):
            traced = torch.jit.trace(ours, (input,), check_trace=False)
        assert torch.equal(flat(traced(input))[0], expected)
        with ran("torch"), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert flat(ours(input))[0].dtype == expected.dtype


@LOW
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_transforms_are_those_of_the_eager_call(kind, low):
    module = build(fusedrnn, kind, I, H)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    inputs = torch.stack([input_of(kind), -input_of(kind), 2 * input_of(kind)])

    def call(w, x):
        with torch.autocast("cpu", low):
            return flat(functional_call(module, w, (x,)))[0]

    def loss(w, x):
        return call(w, x).float().square().sum()

    with ran("kernel_forward"):
        batch = vmap(call, (None, 0))(weights, inputs)
    one_by_one = torch.stack([call(weights, x) for x in inputs])
    assert batch.dtype == one_by_one.dtype == rule(kind, low, F32, None)
    # Not the bits: calls of few rows round no factors to bfloat16.
    assert (batch - one_by_one).norm() <= 2 * torch.finfo(low).eps * one_by_one.norm()

    with ran("kernel_forward", "kernel_backward"):
        gradients = vmap(grad(loss), (None, 0))(weights, inputs)
    for k, x in enumerate(inputs):
        leaves = [w.clone().requires_grad_() for w in weights.values()]
        expected = torch.autograd.grad(loss(dict(zip(weights, leaves, strict=True)), x), leaves)
        for name, e in zip(weights, expected, strict=True):
            assert (gradients[name][k] - e).norm() <= 2 * torch.finfo(low).eps * e.norm()

    with ran("reference"):
        result, tangent = jvp(lambda x: call(weights, x), (inputs[0],), (inputs[1],))
    assert result.dtype == tangent.dtype == batch.dtype
    with torch.autocast("cpu", enabled=False):
        exact = jvp(lambda x: flat(module(x))[0], (inputs[0],), (inputs[1],))[1]
    assert (tangent - exact).norm() <= 2 * torch.finfo(low).eps * exact.norm()


@pytest.mark.parametrize(
    ("kind", "low", "input_dtype", "batch", "computed_by"),
    [
        ("LSTM", BF16, F32, B, "torch"),
        ("LSTM", BF16, BF16, B, "torch"),
        ("LSTM", BF16, F16, B, "kernel_forward"),
        ("LSTM", BF16, F32, 1, "kernel_forward"),
        ("LSTM", F16, F32, B, "kernel_forward"),
        ("LSTM", F16, BF16, B, "kernel_forward"),
        ("GRU", BF16, F32, B, "kernel_forward"),
    ],
)
def test_bfloat16_goes_where_it_is_faster(kind, low, input_dtype, batch, computed_by, monkeypatch):
    monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", True)
    module = build(modules, kind, I, H, 2)
    input = input_of(kind, input_dtype)[:, :batch]
    with torch.autocast("cpu", low), ran(computed_by):
        result = flat(module(input))[0]
    assert result.dtype == rule(kind, low, input_dtype, None)


def test_a_model_that_trains_under_autocast():
    """Loss scaling, clipping and an optimizer around it, as users write it."""
    losses = []
    for module in pair("GRU", I, H, 2, batch_first=True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"rnn": module, "head": nn.Linear(H, 2)})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", F16):
                output, h_n = model["rnn"](input_of("GRU").transpose(0, 1))
                loss = (model["head"](output) - 1).square().mean() + h_n.square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
