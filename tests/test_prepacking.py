"""`prepacked`: the same results with the weights laid out once, and what drops that layout."""

import copy
import threading

import pytest
import torch
from helpers import CELLS, LAYERS, build, matmul_precision, ran, states
from torch import nn

import fusedrnn
from benchmarks.common import threads as num_threads
from fusedrnn import modules, ops

I, H = 9, 33  # noqa: E741
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("kernels_only")


@pytest.fixture
def packs(monkeypatch):
    """What has been laid out, one by one: each with `calls`, the number of those that used it."""
    seen = []

    def pack(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    original = ops.pack
    monkeypatch.setattr(ops, "pack", pack)
    return seen


def made(kind, dtype=torch.float32, **options):
    return build(modules, kind, I, H, dtype=dtype, **options)


def call(module, *inputs):
    with torch.no_grad(), ran("kernel_forward"):
        results = module(*inputs)
    return results[0] if isinstance(results, tuple) else results


def close(a, b, dtype):
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a, b, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(1, 30), (1, 200), (5, 20), (60, 2)], ids=str)
def test_panels_that_a_call_uses_once_give_the_bits_of_kept_ones(kind, dtype, shape, packs):
    """Without `prepacked` they are packed piece by piece. Weights are beyond L2 where it has 2 MB,
    so two threads split units."""
    module = build(modules, kind, 901, 690, dtype=dtype)  # the last panel is folded
    x = torch.randn(*shape, 901, dtype=dtype)
    found = []
    for threads in (1, 2):
        with num_threads(threads):
            found.append(call(module, x))
    with fusedrnn.prepacked(module):
        call(module, x), call(module, x)
        found.append(call(module, x))
    assert packs[-1].calls > 0
    for others in found[1:]:
        assert torch.equal(found[0], others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False, "batch_first": True}],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_layers(kind, dtype, options, steps, packs):
    module = made(kind, dtype, **options)
    x = torch.randn(steps, 3, I, dtype=dtype)
    outside = call(module, x)
    with fusedrnn.prepacked(module):
        inside = [call(module, x) for _ in range(4)]
    # Laid out at the second call, and used from then on.
    assert [p.calls for p in packs] == [3] * options.get("num_layers", 1)
    for result in inside:
        close(result, outside, dtype)
    assert torch.equal(inside[0], outside)
    assert torch.equal(inside[1], inside[3])
    if steps == 30:  # laid out anew, or once: the same products in the same order
        assert torch.equal(inside[1], outside)
    assert torch.equal(call(module, x), outside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (40,)], ids=str)
def test_cells(kind, dtype, shape, packs):
    module = made(kind, dtype)
    x, hx = torch.randn(*shape, I, dtype=dtype), states(kind, *shape, H, dtype=dtype)
    outside = call(module, x, hx)
    with fusedrnn.prepacked(module):
        inside = [call(module, x, hx) for _ in range(3)]
    assert [p.calls for p in packs] == [2]
    for result in inside:
        close(result, outside, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_projections_boundaries_and_lengths(threads, packs):
    module = made("LSTM", proj_size=17, bidirectional=True)
    x = torch.randn(20, 8, I)
    reset = torch.rand(20, 8) < 0.1
    keywords = [{}, {"lengths": [20, 1, 7, 7, 20, 3, 2, 19]}, {"reset_mask": reset}]
    with num_threads(threads), torch.no_grad():
        outside = [module(x, **k)[0] for k in keywords]
        with fusedrnn.prepacked(module):
            module(x)
            inside = [module(x, **k)[0] for k in keywords]
    assert [p.calls for p in packs] == [3]
    assert all(map(torch.equal, inside, outside))


CHANGES = {
    "an operation in place": lambda m: m.weight_hh_l0.mul_(2),
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "an optimizer": lambda m: step(m, torch.optim.SGD(m.parameters(), 0.1)),
    "a fused optimizer": lambda m: step(m, torch.optim.AdamW(m.parameters(), 0.1, fused=True)),
    "another parameter": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(2 * m.weight_hh_l0)),
    "other data": lambda m: setattr(m.weight_hh_l0, "data", 2 * m.weight_hh_l0.data),
    "transposed data": lambda m: transpose(m.weight_hh_l0),
    "another dtype and back": lambda m: doubled(m.double()).float(),
}


def step(module, optimizer):
    with torch.enable_grad():
        module(torch.randn(3, 2, I))[0].sum().backward()
    optimizer.step()


def transpose(weight):
    weight.data = 2 * weight.data.T.contiguous().T


def doubled(module):
    for p in module.parameters():
        p.mul_(2)
    return module


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [1, 30])
def test_changed_weights_are_seen(change, steps, packs):
    module = made("GRU")
    x, hx = torch.randn(steps, 3, I), torch.randn(1, 3, H)
    with fusedrnn.prepacked(module), torch.no_grad():
        before = [call(module, x, hx) for _ in range(2)]
        assert packs[0].calls == 1
        for _ in range(4):  # memory that a copy leaves may be the next one's
            CHANGES[change](module)
            after = [call(module, x, hx) for _ in range(3)]
            twin = fusedrnn.GRU(I, H)
            twin.load_state_dict(module.state_dict())
            outside = call(twin, x, hx)
            assert (before[1] - outside).abs().max() > 1e-3
            for result in after:
                close(result, outside, torch.float32)
    moved = change in ("other data", "transposed data")
    assert packs[0].calls == 1
    assert sum(p is not None and p.calls > 0 for p in packs) == (1 if moved else 5)


def test_other_weights_each_time(packs):
    module = made("GRU")
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(3, 2, I)
    outside = call(module, x)
    with fusedrnn.prepacked(module):
        for _ in range(3):
            assert torch.equal(call(module, x), outside)
    assert packs == []


@pytest.mark.parametrize("precision", ["medium"] + ["high"] * ops.SPLIT_PRODUCTS)
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_another_precision_inside(kind, precision, packs):
    module = made(kind)
    x = torch.randn(30, 3, I) if kind == "LSTM" else torch.randn(40, I)
    outside = call(module, x)
    with matmul_precision(precision):
        rounded = call(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = call(module, x)
    with fusedrnn.prepacked(module):
        for _ in range(3):
            assert torch.equal(call(module, x), outside)
            with matmul_precision(precision):
                assert torch.equal(call(module, x), rounded)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(call(module, x), autocast)
    # Autocast's are those of "medium".
    assert [p.calls for p in packs] == ([5, 2] if precision == "medium" else [2, 2, 2])
    assert torch.equal(rounded, outside) == (not ops.BF16_PRODUCTS)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low, packs):
    module = made("LSTM")
    x = torch.randn(30, 3, I)
    with torch.autocast("cpu", low):
        outside = call(module, x)
        with fusedrnn.prepacked(module):
            assert torch.equal(call(module, x), outside)
            assert torch.equal(call(module, x), outside)
    assert [p.calls for p in packs] == [1]


def test_gradients_inside_are_those_outside(packs):
    module = made("GRU")
    x = torch.randn(5, 3, I)

    def gradient():
        module.zero_grad()
        with ran("kernel_forward", "kernel_backward"):
            module(x)[0].sum().backward()
        return module.weight_hh_l0.grad.clone()

    outside = gradient()
    with fusedrnn.prepacked(module):
        for _ in range(2):
            call(module, x)
        assert torch.equal(gradient(), outside)
    assert [p.calls for p in packs] == [1]


def test_a_model_with_several_and_contexts_in_contexts(packs):
    model = nn.ModuleDict(
        {"a": made("GRU"), "b": nn.Sequential(made("LSTMCell")), "c": nn.Linear(1, 1)}
    )
    x = torch.randn(3, I)
    with fusedrnn.prepacked(model):
        with fusedrnn.prepacked(model["a"]):
            call(model["a"], x)
        call(model["a"], x)
        for _ in range(2):
            call(model["b"], x)
        assert [p.calls for p in packs] == [1, 1]
        twin = copy.deepcopy(model)  # is not of this context
        for _ in range(2):
            close(call(twin["a"], x), call(model["a"], x), torch.float32)
        assert [p.calls for p in packs] == [3, 1]
    for _ in range(2):
        call(model["a"], x)
    assert [p.calls for p in packs] == [3, 1]
    with fusedrnn.prepacked(model):
        for _ in range(2):
            call(model["a"], x)
    assert [p.calls for p in packs] == [3, 1, 1]


def test_contexts_that_overlap(packs):
    module = made("GRU")
    x = torch.randn(3, 2, I)
    first, second = fusedrnn.prepacked(module), fusedrnn.prepacked(module)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    for _ in range(3):
        call(module, x)
    second.__exit__(None, None, None)
    assert [p.calls for p in packs] == [2]
    assert fusedrnn.prepacking.active == 0


def test_what_stays_as_it_is_outside(packs):
    with torch.inference_mode():
        module = made("GRU")  # weights without versions
    x = torch.randn(3, 2, I)
    with fusedrnn.prepacked(module):
        close(call(module, x), call(module, x), torch.float32)
    assert packs == []
    on_meta = made("GRU", device="meta")
    with fusedrnn.prepacked(on_meta), torch.no_grad():
        assert on_meta(x.to("meta"))[0].shape == (3, 2, H)


def test_an_error_inside_ends_it(packs):
    module = made("GRU")
    with pytest.raises(RuntimeError, match="input"), fusedrnn.prepacked(module):
        module(torch.randn(3, 2, I + 1))
    call(module, torch.randn(3, 2, I))
    assert packs == []
    assert fusedrnn.prepacking.active == 0


def test_a_model_without_any():
    with pytest.raises(ValueError, match=r"Linear has no LSTM.*fusedrnn\.replace"):
        fusedrnn.prepacked(nn.Linear(1, 1)).__enter__()


def test_several_threads(packs):
    module = made("LSTM")
    x = torch.randn(40, 2, I)
    outside = call(module, x)
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(module(x)[0], outside):
                    wrong.append(1)

    with fusedrnn.prepacked(module):
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not wrong
    assert sum(p.calls for p in packs) > 100
