"""What `explain` says is what happens: its first word against the counters, its plan against the
shapes that each plan is for."""

import subprocess
import sys

import pytest
import torch
from helpers import CELLS, LAYERS, build, matmul_precision, pair, ran, states
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fusedrnn
from fusedrnn import modules, ops

T, B, I, H = 7, 3, 5, 6  # noqa: E741

COUNTED = {"kernels": "kernel_forward", "reference": "reference", "torch.nn": "torch"}


def says(module, *arguments):
    """The explanation, after a call has shown that its first word is true."""
    text = fusedrnn.explain(module, *arguments)
    with torch.no_grad(), ran(COUNTED[text.split(":")[0]]):
        module(*arguments)
    return text


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
def test_layers(kind, dtype, options):
    if kind == "LSTM" and dtype is torch.bfloat16 and modules._TORCH_MULTIPLIES_FASTER:
        pytest.skip("torch's is faster here")
    module = build(modules, kind, I, H, num_layers=2, dtype=dtype, **options)
    directions = 1 + ("bidirectional" in options)
    text = says(module, torch.randn(T, B, I, dtype=dtype))
    assert text.startswith(f"kernels: {fusedrnn.isa()}, ")
    assert "Layer 1: " in text
    hx = states(kind, 2 * directions, B, H, dtype=dtype)
    assert says(module, torch.randn(T, B, I, dtype=dtype), hx) == text
    unbatched = states(kind, 2 * directions, H, dtype=dtype)
    assert says(module, torch.randn(T, I, dtype=dtype), unbatched).startswith("kernels: ")


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind):
    module = build(modules, kind, I, H, num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.randn(n, I) for n in (7, 4, 4)])
    assert "Layer 1: " in says(module, packed)
    assert says(module, packed, states(kind, 4, 3, H, dtype=torch.float32)).startswith("kernels: ")


@pytest.mark.parametrize("kind", LAYERS)
def test_jagged_nested_tensors(kind):
    module = build(modules, kind, I, H, num_layers=2)
    rows = [torch.randn(n, I) for n in (7, 4, 4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert says(module, nested) == fusedrnn.explain(module, pack_sequence(rows))
    assert says(module, nested, states(kind, 2, 3, H, dtype=torch.float32)).startswith("kernels")


def test_projections():
    module = build(modules, "LSTM", I, H, num_layers=2, proj_size=2, bias=False)
    assert "Layer 1: " in says(module, torch.randn(T, B, I))


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind):
    module = build(modules, kind, I, H)
    for shape in ((B,), ()):
        hx = states(kind, *shape, H, dtype=torch.float32)
        assert "as they lie in memory" in says(module, torch.randn(*shape, I), hx)


def test_what_torch_computes():
    module = build(modules, "GRU", I, H)
    x = torch.randn(T, B, I)
    assert "meta" in says(build(modules, "GRU", I, H, device="meta"), x.to("meta"))
    assert "complex64" in says(module.to(torch.complex64), x.to(torch.complex64))
    if modules._TORCH_MULTIPLIES_FASTER:
        lstm = build(modules, "LSTM", I, H, dtype=torch.bfloat16)
        assert "its bfloat16 products are faster" in says(lstm, x.bfloat16())

    class Tagged(torch.Tensor):
        pass

    assert "no ordinary one" in says(build(modules, "GRU", I, H), x.as_subclass(Tagged))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_autocast(kind, low, monkeypatch):
    monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", False)
    module = build(modules, kind, I, H)
    x = torch.randn(*((T,) if kind in LAYERS else ()), B, I)
    with torch.autocast("cpu", low):
        dtype = str((module(x)[0][0] if kind in LAYERS else module(x)[0]).dtype)[6:]
        said, said_of_low = says(module, x), says(module.to(low), x.to(low))
        assert f" under autocast, results in {dtype}." in said
        products = low is torch.bfloat16 and ops.BF16_PRODUCTS
        multiplied = ", numbers multiplied as "
        assert (multiplied if products and kind in LAYERS else ", float32 ") in said
        products = products or (ops.SPLIT_PRODUCTS and kind in LAYERS)
        assert (multiplied if products else f", {str(low)[6:]} widened") in said_of_low
        assert ", float64." in says(module.double(), x.double())
        assert "several dtypes" in fusedrnn.explain(module, x)
    if kind == "LSTM":
        monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", True)
        with torch.autocast("cpu", torch.bfloat16):
            assert "are faster on this CPU" in fusedrnn.explain(module.float(), x)


def test_under_transforms():
    module = build(modules, "GRU", I, H)
    x = torch.randn(2, T, B, I)
    said = []
    torch.func.vmap(lambda x: (said.append(says(module, x)), x)[1])(x)
    torch.func.jvp(lambda x: (said.append(says(module, x)), x)[1], (x[0],), (x[1],))
    assert [s.split(":")[0] for s in said] == ["kernels", "reference"]


WRONG = {
    "features": (torch.randn(T, B, I + 1),),
    "no tensor": ([1.0],),
    "dimensions": (torch.randn(2, T, B, I),),
    "hx of another batch": (torch.randn(T, B, I), torch.randn(1, B + 1, H)),
    "hx without a batch": (torch.randn(T, B, I), torch.randn(1, H)),
    "hx of another kind": (torch.randn(T, B, I), (torch.randn(1, B, H),)),
    "dtype": (torch.randn(T, B, I).double(),),
    "no steps": (torch.randn(0, B, I),),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_torchs(case):
    module = build(modules, "GRU", I, H)
    assert fusedrnn.explain(module, *WRONG[case]).startswith("torch.nn: ")
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)), ran():
        module(*WRONG[case])


def test_other_modules():
    theirs, ours = pair("LSTM", I, H)
    assert "fusedrnn.replace(model)" in fusedrnn.explain(theirs, torch.randn(T, B, I))
    with pytest.raises(TypeError, match="explain takes an LSTM, GRU, RNN or one of their cells"):
        fusedrnn.explain(nn.Sequential(ours), torch.randn(T, B, I))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("cell", "shape", "directions", "words"),
    [
        ("LSTM", (100, 1, 32), 1, "one thread of 2"),  # H at most 64: no synchronisation
        ("LSTM", (100, 1, 256), 1, "the hidden units are split in 2"),
        ("LSTM", (100, 32, 128), 1, "the batch is split in 2, which never wait"),
        ("LSTM", (100, 1, 256), 2, "the directions run side by side"),
        (
            "LSTM",
            (100, 64, 1024),
            1,
            "the hidden units are split in 2",
        ),  # weights larger than the L2
        ("LSTM", (100, 5, 128), 1, "the hidden units are split in 2"),  # no full tile a thread
        ("RNN", (100, 8, 128), 1, "the batch is split in 2, which never wait"),
        ("GRU", (2, 32, 128), 1, "the hidden units are split in 2"),  # packing is most of the work
        ("LSTM", (3, 64, 16), 1, "the batch is split in 2"),  # units of one vector
        ("LSTM", (1, 1, 256), 1, "as they lie in memory"),
        ("LSTM", (100, 1, 256), 1, "laid out anew"),
    ],
)
def test_plans(cell, shape, directions, words):
    module = build(modules, cell, shape[2], shape[2], bidirectional=directions == 2)
    assert words in fusedrnn.explain(module, torch.empty(shape))


@pytest.mark.parametrize(
    ("precision", "served", "words", "excuse"),
    [
        ("medium", ops.BF16_PRODUCTS, ", numbers multiplied as bfloat16", "this CPU has no"),
        ("high", ops.SPLIT_PRODUCTS, "as two bfloat16 parts each", "products of that"),
    ],
    ids=["medium", "high"],
)
def test_a_precision(precision, served, words, excuse):
    module = build(modules, "LSTM", I, H)
    x = torch.randn(T, B, I)
    exact = module(x)[0]
    with matmul_precision(precision):
        assert torch.equal(module(x)[0], exact) == (not served)
        if served:
            assert words in says(module, x)
            assert f"{precision!r}, but so few steps do not pay" in says(module, x[:1])
            projected = build(modules, "LSTM", I, H, proj_size=2)
            assert f"{precision!r}, but a layer with a projection" in says(projected, x)
        else:
            assert f"{precision!r}, but {excuse}" in says(module, x)
        assert ", float64." in says(module.double(), x.double())


# Beside torch.set_float32_matmul_precision, whose getter raises after any of them.
SETTINGS = {
    "cuda.matmul.fp32_precision = 'tf32'": "highest",
    "fp32_precision = 'tf32'": "high",
    "mkldnn.matmul.fp32_precision = 'bf16'": "medium",
    "mkldnn.fp32_precision = 'bf16'; torch.backends.mkldnn.rnn.fp32_precision = 'ieee'": "highest",
    "cuda.matmul.allow_tf32 = not torch.set_float32_matmul_precision('medium')": "medium",
}
CALLS = """
import fusedrnn, torch
layer, x = fusedrnn.LSTM(64, 64), torch.randn(9, 20, 64)
torch.backends.{setting}
print(fusedrnn.ops.precision(), fusedrnn.explain(layer, x))
with torch.no_grad():
    results = layer(x)[0]
layer(x)[0].sum().backward()
torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "none"
torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.rnn.fp32_precision = "none"
torch.set_float32_matmul_precision("{word}")
with torch.no_grad():
    assert torch.equal(results, layer(x)[0])
assert fusedrnn.ops.counts == {{**fusedrnn.ops.counts, "kernel_forward": 3, "torch": 0}}
"""


@pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch has no such settings"
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_single_backends(setting):
    code = CALLS.format(setting=setting, word=SETTINGS[setting])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == SETTINGS[setting]
