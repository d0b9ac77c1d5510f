"""The modules against torch.nn: results, gradients, errors, and everything that a torch.nn module
can be asked for. Not the kernels' accuracy over sizes and ISAs, which the kernels' tests hold."""

import copy
import io
import pickle
import typing
import warnings

import pytest
import torch
from helpers import (
    CELLS,
    LAYERS,
    assert_same,
    build,
    flat,
    pair,
    raised,
    ran,
    run,
    states,
)
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fusedrnn import modules

KERNELS = ("kernel_forward", "kernel_backward")
I, H, T, B = 5, 7, 6, 3  # noqa: E741

OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"batch_first": True},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    {"num_layers": 3, "dropout": 0.5},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3},
    {"num_layers": 2, "dropout": 1.0},
]


def name_of(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


def sizes(options):
    """num_layers * directions, the first size of hx."""
    return options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)


def random_input(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def hx_of(how, kind, *shape, dtype=torch.float64):
    if how == "none":
        return None
    if how == "given":
        return states(kind, *shape, dtype=dtype)
    hx = states(kind, shape[0], 1, shape[2], dtype=dtype)  # one learned state for the whole batch
    return tuple(s.expand(shape) for s in hx) if isinstance(hx, tuple) else hx.expand(shape)


# Results and gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("hx", ["none", "given", "expanded"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_match_torch(kind, options, hx, dtype):
    theirs, ours = pair(kind, I, H, dtype=dtype, **options)
    input = random_input(*((B, T, I) if options.get("batch_first") else (T, B, I)), dtype=dtype)
    hx = hx_of(hx, kind, sizes(options), B, H, dtype=dtype)
    with ran(*KERNELS):
        actual = run(ours, input, hx)
    assert_same(actual, run(theirs, input, hx), dtype)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (9, 1), (2, 17)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_short_and_small_sequences_match_torch(kind, batch_first, shape):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    theirs, ours = pair(kind, I, H, dtype=torch.float64, **options)
    seq_len, batch = shape
    input = random_input(*((batch, seq_len, I) if batch_first else (seq_len, batch, I)))
    hx = states(kind, 4, batch, H)
    with ran(*KERNELS):
        actual = run(ours, input, hx)
    assert_same(actual, run(theirs, input, hx))


@pytest.mark.parametrize("hx", ["none", "given"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_unbatched_input_matches_torch(kind, batch_first, hx):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    theirs, ours = pair(kind, I, H, dtype=torch.float64, **options)
    hx = None if hx == "none" else states(kind, 4, H)
    with ran(*KERNELS):
        actual = run(ours, random_input(T, I), hx)
    assert_same(actual, run(theirs, random_input(T, I), hx))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("I", "H"), [(I, H), (5, 128), (256, 300)])
def test_zero_batch_gives_empty_output_and_zero_gradients(kind, I, H):  # noqa: E741
    theirs, ours = pair(kind, I, H, 2, dtype=torch.float64)
    actual = run(ours, random_input(T, 0, I), states(kind, 2, 0, H))
    assert actual["result 0"].shape == (T, 0, H)
    assert_same(actual, run(theirs, random_input(T, 0, I), states(kind, 2, 0, H)))


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_input_and_states_match_torch(kind):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    input = random_input(B, I, 2 * T).permute(2, 0, 1)[::2]
    hx = states(kind, H, B, 1)
    hx = tuple(s.permute(2, 1, 0) for s in hx) if isinstance(hx, tuple) else hx.permute(2, 1, 0)
    assert not input.is_contiguous()
    with torch.no_grad(), ran("kernel_forward"):
        actual = flat(ours(input, hx))
    torch.testing.assert_close(actual, flat(theirs(input, hx)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_are_laid_out_as_torch_lays_them(kind, batch_first):
    for actual, expected in zip(
        *(
            flat(m(random_input(B, T, I)))
            for m in pair(kind, I, H, 2, batch_first=batch_first, dtype=torch.float64)
        ),
        strict=True,
    ):
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()


def test_lstm_takes_hx_as_a_list():
    lstm = modules.LSTM(I, H)
    input, hx = random_input(T, B, I, dtype=torch.float32), list(states("LSTM", 1, B, H))
    hx = [s.float() for s in hx]
    with ran("kernel_forward"):
        results = flat(lstm(input, hx))
    assert all(map(torch.equal, results, flat(lstm(input, tuple(hx)))))


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("hx", ["none", "given"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_match_torch(kind, dtype, bias, hx, batch):
    theirs, ours = pair(kind, I, H, bias=bias, dtype=dtype)
    lead = () if batch is None else (batch,)
    input = random_input(*lead, I, dtype=dtype)
    hx = None if hx == "none" else states(kind, *lead, H, dtype=dtype)
    with ran(*KERNELS):
        actual = run(ours, input, hx)
    assert_same(actual, run(theirs, input, hx), dtype)


@pytest.mark.parametrize("sizes", [(0, I, H), (B, 0, H), (B, I, 0)], ids=str)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_cells_with_an_empty_size_match_torch(kind, sizes):
    batch, input_size, hidden_size = sizes
    theirs, ours = pair(kind, input_size, hidden_size, dtype=torch.float64)
    input, hx = random_input(batch, input_size), states(kind, batch, hidden_size)
    assert_same(run(ours, input, hx), run(theirs, input, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_follows_mode_and_attribute(kind):
    theirs, ours = pair(kind, I, H, 2, dropout=0.5)
    input = random_input(T, B, I, dtype=torch.float32)
    torch.manual_seed(5)
    dropped = ours(input)[0]
    kept = ours.eval()(input)[0]
    assert not torch.allclose(dropped, kept)
    torch.testing.assert_close(kept, theirs.eval()(input)[0], rtol=5e-5, atol=5e-5)
    ours.train().dropout = 0.0
    assert torch.equal(ours(input)[0], kept)


# Construction


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:dropout option")
def test_layers_are_built_as_torch_builds_them(kind, options):
    assert_built_alike(*pair(kind, I, H, **options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_built_as_torch_builds_them(kind, bias):
    assert_built_alike(*pair(kind, I, H, bias))


def assert_built_alike(theirs, ours):
    assert repr(ours) == repr(theirs)
    parameters = dict(ours.named_parameters())
    assert list(parameters) == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(parameters[name], p) for name, p in theirs.named_parameters())
    plain = {k: v for k, v in vars(theirs).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(ours).items() if not k.startswith("_")} == plain


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2, "cpu", torch.float64)),
        ("GRU", (3, 4, 2, False, True, 0.5, True)),
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True)),
        ("LSTMCell", (3, 4, False, "cpu", torch.float64)),
        ("GRUCell", (3, 4, False, "cpu", torch.float64)),
        ("RNNCell", (3, 4, False, "relu", "cpu", torch.float64)),
    ],
)
def test_constructor_takes_positional_arguments(kind, arguments):
    assert_built_alike(*pair(kind, *arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "options"),
    [
        (kind, *case)
        for kind in ("LSTM", "GRU", "RNN")
        for case in [
            ((), {}),
            ((3,), {}),
            ((3, 4), {"dropout": True}),
            ((3, 4), {"dropout": -0.1}),
            ((3, 4), {"dropout": 1.1}),
            ((3, 4), {"dropout": "a"}),
            ((3, 4), {"bias": 1}),
            ((3, 4), {"batch_first": 1}),
            ((3.0, 4), {}),
            ((3, 4.0), {}),
            ((0, 4), {}),
            ((3, 0), {}),
            ((3, 4, 0), {}),
            ((3, 4, 1.5), {}),
            ((3, 4), {"proj_size": 4}),
            ((3, 4), {"proj_size": -1}),
            ((3, 4), {"nonlinearity": "sigmoid"}),
            ((3, 4), {"unknown": 1}),
        ]
    ]
    + [(kind, (), {}) for kind in ("LSTMCell", "GRUCell", "RNNCell")],
)
def test_constructor_errors_are_those_of_torch(kind, arguments, options):
    theirs = raised(lambda: build(nn, kind, *arguments, **options))
    ours = raised(lambda: build(modules, kind, *arguments, **options))
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_with_one_layer_warns(kind):
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        build(modules, kind, 3, 4, dropout=0.5)


def test_classes_are_no_torch_layers_but_torch_bases():
    # Dynamo breaks the graph at every instance of nn.LSTM, nn.GRU and nn.RNN.
    for kind in ("LSTM", "GRU", "RNN"):
        layer = build(modules, kind, 3, 4)
        assert isinstance(layer, nn.RNNBase)
        assert not isinstance(layer, (nn.LSTM, nn.GRU, nn.RNN))
    assert isinstance(modules.LSTMCell(3, 4), nn.LSTMCell)


# Errors of a call


def layer_calls(kind):
    """{what is wrong: a call of a module built with (I, H, 2 layers)}"""
    zeros = torch.zeros

    def hx(*shape, dtype=torch.float32):
        state = zeros(*shape, dtype=dtype)
        return (state, state) if kind == "LSTM" else state

    calls = {
        "1-D input": lambda m: m(zeros(I)),
        "4-D input": lambda m: m(zeros(1, T, B, I)),
        "input_size": lambda m: m(zeros(T, B, I + 1)),
        "input_size unbatched": lambda m: m(zeros(T, I + 1)),
        "integer input": lambda m: m(zeros(T, B, I, dtype=torch.int64)),
        "float64 input": lambda m: m(zeros(T, B, I, dtype=torch.float64)),
        "half input": lambda m: m(zeros(T, B, I, dtype=torch.half)),
        "no steps": lambda m: m(zeros(0, B, I)),
        "no steps, no batch": lambda m: m(zeros(0, 0, I)),
        "2-D hx": lambda m: m(zeros(T, B, I), hx(B, H)),
        "3-D hx unbatched": lambda m: m(zeros(T, I), hx(2, 1, H)),
        "hx layers": lambda m: m(zeros(T, B, I), hx(1, B, H)),
        "hx batch": lambda m: m(zeros(T, B, I), hx(2, B + 1, H)),
        "hx batch of one": lambda m: m(zeros(T, B, I), hx(2, 1, H)),
        "hx size": lambda m: m(zeros(T, B, I), hx(2, B, H + 1)),
        "hx size unbatched": lambda m: m(zeros(T, I), hx(2, H + 1)),
        "input a list": lambda m: m([[1.0]]),
        "input None": lambda m: m(None),
        "hx a number": lambda m: m(zeros(T, B, I), 1.0),
        "no input": lambda m: m(),
        "meta input": lambda m: m(zeros(T, B, I, device="meta")),
        "meta hx": lambda m: m(zeros(T, B, I), _map(hx(2, B, H), lambda s: s.to("meta"))),
    }
    if kind == "LSTM":
        calls |= {
            "c of another size": lambda m: m(zeros(T, B, I), (hx(2, B, H)[0], hx(2, B, H + 1)[0])),
            "hx of one": lambda m: m(zeros(T, B, I), hx(2, B, H)[:1]),
            "hx of three": lambda m: m(zeros(T, B, I), hx(2, B, H) * 2),
            "hx a tensor": lambda m: m(zeros(T, B, I), hx(2, B, H)[0]),
            "hx of None": lambda m: m(zeros(T, B, I), (None, None)),
        }
    else:
        calls["hx a tuple"] = lambda m: m(zeros(T, B, I), (hx(2, B, H), hx(2, B, H)))
    return calls


def cell_calls(kind):
    zeros = torch.zeros

    def hx(*shape):
        return (zeros(*shape), zeros(*shape)) if kind == "LSTMCell" else zeros(*shape)

    calls = {
        "0-D input": lambda m: m(zeros(())),
        "3-D input": lambda m: m(zeros(T, B, I)),
        "3-D hx": lambda m: m(zeros(B, I), hx(1, B, H)),
        "input_size": lambda m: m(zeros(B, I + 1)),
        "input_size unbatched": lambda m: m(zeros(I + 1)),
        "hx batch": lambda m: m(zeros(B, I), hx(B + 1, H)),
        "hx batch of one": lambda m: m(zeros(B, I), hx(1, H)),
        "hx size": lambda m: m(zeros(B, I), hx(B, H + 1)),
        "1-D hx": lambda m: m(zeros(B, I), hx(H)),
        "2-D hx unbatched": lambda m: m(zeros(I), hx(1, H)),
        "meta input": lambda m: m(zeros(B, I, device="meta")),
        "input None": lambda m: m(None),
        "hx a number": lambda m: m(zeros(B, I), 1.0),
    }
    if kind == "LSTMCell":
        calls["hx of one"] = lambda m: m(zeros(B, I), hx(B, H)[:1])
        calls["c of another size"] = lambda m: m(zeros(B, I), (zeros(B, H), zeros(B, H + 1)))
    return calls


def _map(hx, function):
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(kind, wrong) for kind in LAYERS for wrong in layer_calls(kind)]
    + [(kind, wrong) for kind in CELLS for wrong in cell_calls(kind)],
)
def test_call_errors_are_those_of_torch(kind, wrong):
    calls = cell_calls(kind) if kind in CELLS else layer_calls(kind)
    theirs, ours = pair(kind, I, H) if kind in CELLS else pair(kind, I, H, 2)
    with ran():  # nothing computed by anyone
        error = raised(lambda: calls[wrong](ours))
    expected = raised(lambda: calls[wrong](theirs))
    assert type(error) is type(expected)
    if wrong != "hx of None":  # the first attribute that is missing is another one
        assert str(error).replace("_OneStateLayers", kind.partition("_")[0]) == str(expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_input_is_checked(kind):
    layer = build(modules, kind, I, H, 2)
    packed = pack_sequence([torch.zeros(T, I), torch.zeros(T - 1, I)])
    hx = _map(states(kind, 2, 3, H), lambda s: s.float())
    with pytest.raises(
        RuntimeError, match=r"Expected hidden(\[0\])? size \(2, 2, 7\), got \[2, 3, 7\]"
    ):
        layer(packed, hx)
    with pytest.raises(RuntimeError, match="Expected 5, got 6"):
        layer(pack_sequence([torch.zeros(T, I + 1)]))
    with pytest.raises(ValueError, match=r"torch\.float64.*torch\.float32"):
        layer(pack_sequence([torch.zeros(T, I).double()]))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("hx_dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_hx_of_another_dtype_is_an_error_that_names_both(kind, hx_dtype):
    module = build(modules, kind, I, H)
    lead = (B,) if kind in CELLS else (1, B)
    hx = _map(states(kind, *lead, H), lambda s: s.to(hx_dtype))
    with pytest.raises(RuntimeError, match=r"torch\.float32") as caught:
        module(torch.zeros(*((T,) if kind in LAYERS else ()), B, I), hx)
    assert str(hx_dtype) in str(caught.value)


# What torch's own implementation takes


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("hx", ["none", "given"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequence_matches_torch(kind, hx, enforce_sorted):
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "dtype": torch.float64}
    lengths = [6, 3, 1] if enforce_sorted else [3, 6, 1]
    hx = None if hx == "none" else states(kind, 4, B, H)
    results = []
    for module in pair(kind, I, H, **options):
        input = random_input(T, B, I).requires_grad_()
        packed = pack_padded_sequence(input, lengths, enforce_sorted=enforce_sorted)
        torch.manual_seed(4)
        with ran("kernel_forward") if isinstance(module, modules._Fused) else ran():
            output, state = module(packed, hx)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)
        sum(t.square().sum() for t in flat(output.data, state)).backward()
        results.append([output.data, *flat(state), input.grad])
        results[-1] += [p.grad for p in module.parameters()]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
def test_projection_matches_torch(batch_first):
    theirs, ours = pair(
        "LSTM",
        I,
        H,
        2,
        bidirectional=True,
        proj_size=2,
        batch_first=batch_first,
        dtype=torch.float64,
    )
    input = random_input(*((B, T, I) if batch_first else (T, B, I)))
    with ran("kernel_forward", "kernel_backward"):
        actual = run(ours, input)
    assert_same(actual, run(theirs, input))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_bfloat16_and_float16_run_in_the_kernels(kind, dtype, monkeypatch):
    monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", False)
    theirs, ours = pair(kind, I, H, dtype=dtype)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I, dtype=dtype)
    with ran("kernel_forward", "kernel_backward"):
        actual = run(ours, input)
    expected = run(theirs, input)
    exact = run(theirs.double(), input.double())
    for key, value in exact.items():
        assert actual[key].dtype == dtype
        allowed = 2 * (expected[key] - value).norm() + torch.finfo(dtype).eps * value.norm()
        assert (actual[key] - value).norm() <= allowed


@pytest.mark.parametrize(
    ("kind", "batch", "hidden", "train", "computed_by"),
    [
        ("LSTM", 1, H, True, "kernel_forward"),
        ("LSTM", 1, 300, True, "kernel_forward"),
        ("LSTM", 1, 300, False, "torch"),
        ("LSTM", B, H, True, "torch"),
        ("GRU", B, H, True, "kernel_forward"),
        ("GRU", 32, 256, True, "torch"),
    ],
)
def test_bfloat16_goes_where_it_is_faster(kind, batch, hidden, train, computed_by, monkeypatch):
    monkeypatch.setattr(modules, "_TORCH_MULTIPLIES_FASTER", True)
    _, ours = pair(kind, I, hidden, dtype=torch.bfloat16)
    input = random_input(T, batch, I, dtype=torch.bfloat16)
    with ran(computed_by), torch.set_grad_enabled(train):
        ours(input)


@pytest.mark.parametrize("kind", [*LAYERS[:3], *CELLS[:3]])
def test_complex_numbers_are_computed_by_torch(kind):
    # torch's own complex64 LSTM goes another way
    dtype = torch.complex128 if kind.startswith("LSTM") else torch.complex64
    theirs, ours = pair(kind, I, H, dtype=dtype)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I, dtype=dtype)
    with ran("torch"):
        actual = flat(ours(input))
    assert all(map(torch.equal, actual, flat(theirs(input))))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_meta_device(kind):
    module = build(modules, kind, I, H).to("meta")
    input = torch.empty(*((T,) if kind in LAYERS else ()), B, I, device="meta")
    with ran("torch"):
        result = flat(module(input))[0]
    assert result.device.type == "meta"
    assert result.shape == (*input.shape[:-1], H)


def test_default_device_of_a_context_does_not_reach_the_call():
    lstm = modules.LSTM(I, H, 2)
    input = random_input(T, B, I, dtype=torch.float32)
    expected = lstm(input)[0]
    with torch.device("meta"), ran("kernel_forward"):
        assert torch.equal(lstm(input)[0], expected)


class Tagger(nn.Module):
    """A small model around a recurrent module."""

    def __init__(self, module):
        super().__init__()
        self.rnn = module
        self.head = nn.Linear(H, 2)

    def forward(self, input):
        return self.head(self.rnn(input)[0])  # GRUCell and RNNCell: of the batch's first row


def taggers(kind, **options):
    models = []
    for namespace in (nn, modules):
        model = Tagger(build(namespace, kind, I, H, **options))
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    return models


def tagger_input(kind, seq_len=T):
    return random_input(*((seq_len,) if kind in LAYERS else ()), B, I, dtype=torch.float32)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_compiled_model_matches_torch(kind):
    options = {"num_layers": 2, "dropout": 0.5} if kind in LAYERS else {}
    theirs, ours = taggers(kind, **options)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    # The layers of it are the kernels', a cell torch's operations.
    with ran(*(KERNELS if kind in LAYERS else ())):
        actual = run(compiled, tagger_input(kind))
    expected = run(theirs, tagger_input(kind))
    assert_same(
        {key.replace("_orig_mod.", ""): value for key, value in actual.items()},
        expected,
        torch.float32,
    )


def test_compiled_subclass_runs_its_forward_once():
    class Doubling(modules.LSTM):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    lstm = Doubling(I, H)
    torch._dynamo.reset()
    input = tagger_input("LSTM")
    compiled = torch.compile(lstm, backend="eager")
    torch.testing.assert_close(compiled(input), lstm(input))
    torch.testing.assert_close(lstm(input), modules.LSTM.forward(lstm, 2 * input))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_relu"])
@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # as torch.nn's
def test_export_keeps_the_operation_of_torch(kind):
    theirs, ours = (model.eval() for model in taggers(kind, num_layers=2))
    input = tagger_input(kind)
    targets = [
        [node.target for node in torch.export.export(model, (input,)).graph.nodes]
        for model in (theirs, ours)
    ]
    assert targets[0] == targets[1]
    torch.testing.assert_close(torch.export.export(ours, (input,)).module()(input), theirs(input))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_and_scripted_models_match_torch(kind):
    theirs, ours = (model.eval() for model in taggers(kind))
    other = tagger_input(kind, seq_len=T + 3)
    traced = torch.jit.trace(ours, (tagger_input(kind),))
    torch.testing.assert_close(traced(other), theirs(other))
    scripted = torch.jit.script(ours)
    torch.testing.assert_close(scripted(other), theirs(other))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_make_fx_records_every_operation(kind, pre_dispatch, grad):
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    theirs, ours = (model.eval() for model in taggers(kind))
    with torch.set_grad_enabled(grad):
        graph = make_fx(lambda input: ours(input), pre_dispatch=pre_dispatch)(tagger_input(kind))
    other = -tagger_input(kind)
    torch.testing.assert_close(graph(other), theirs(other))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_make_fx_records_the_backward_pass_alone(kind):
    _, ours = taggers(kind)
    input = tagger_input(kind).requires_grad_()
    output = ours(input)

    def function(grad):
        return torch.autograd.grad(output, input, grad, retain_graph=True)[0]

    made = torch.fx.experimental.proxy_tensor.make_fx(function)(torch.randn_like(output))
    grad = torch.randn_like(output)
    torch.testing.assert_close(made(grad), function(grad))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_vmap_of_a_backward_pass(kind):
    """The usual way to a Jacobian, of a graph that was made outside."""
    found = []
    for module in taggers(kind):
        input = tagger_input(kind).requires_grad_()
        output = module.eval()(input)
        grads = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(0))
        found.append(
            torch.func.vmap(
                lambda v, o=output, i=input: torch.autograd.grad(o, i, v, retain_graph=True)[0]
            )(grads)
        )
    torch.testing.assert_close(*found)


def test_fake_tensors_give_shapes():
    with torch._subclasses.FakeTensorMode(), ran("torch"):
        output = modules.LSTM(I, H, bidirectional=True)(torch.randn(T, B, I))[0]
    assert output.shape == (T, B, 2 * H)


# What a torch.nn module can be asked for


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_state_dict_goes_both_ways(kind):
    theirs, _ = pair(kind, I, H, dtype=torch.float64)
    ours = build(modules, kind, I, H, dtype=torch.float64, seed=9)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.5)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same(run(ours, input), run(theirs, input))
    # assign=True puts other tensors in the parameters' place.
    ours.load_state_dict({k: 2 * v for k, v in theirs.state_dict().items()}, assign=True)
    theirs.load_state_dict(ours.state_dict())
    assert_same(run(ours, input), run(theirs, input))


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_save])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_copies_are_equal_and_independent(kind, copied):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    twin = copied(ours)
    assert type(twin) is type(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    assert_same(run(twin, input), run(theirs, input))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_double_converts_weights_and_results(kind):
    module = build(modules, kind, I, H).double()
    with ran("kernel_forward"):
        result = flat(module(random_input(*((T,) if kind in LAYERS else ()), B, I)))[0]
    assert result.dtype == torch.float64


def weight_name(kind):
    return "weight_hh_l0" if kind in LAYERS else "weight_hh"


def assign_tensor(module, name):
    weight = 2 * getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, weight.requires_grad_())


def assign_parameter(module, name):
    setattr(module, name, nn.Parameter(2 * getattr(module, name).detach()))


def register_parameter(module, name):
    module.register_parameter(name, nn.Parameter(2 * getattr(module, name).detach()))


def write_in_place(module, name):
    getattr(module, name).data.mul_(2)


def delete_and_set(module, name):
    weight = getattr(module, name)
    delattr(module, name)
    module.float()
    module.double()
    setattr(module, name, weight)


def prune_weight(module, name):
    torch.manual_seed(0)
    prune.random_unstructured(module, name, 0.5)


def prune_and_remove(module, name):
    prune_weight(module, name)
    module(random_input(*((T,) if name.endswith("l0") else ()), B, I))
    prune.remove(module, name)


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


def parametrize_and_remove(module, name):
    parametrizations.weight_norm(module, name)
    module(random_input(*((T,) if name.endswith("l0") else ()), B, I))
    nn.utils.parametrize.remove_parametrizations(module, name)


@pytest.mark.parametrize(
    "change",
    [
        assign_tensor,
        assign_parameter,
        register_parameter,
        write_in_place,
        delete_and_set,
        prune_weight,
        prune_and_remove,
        old_weight_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrize_and_remove,
    ],
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_tanh", "LSTMCell", "GRUCell", "RNNCell_tanh"])
def test_changed_weights_are_the_ones_used(kind, change):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    before = flat(ours(input))[0]
    for module in (theirs, ours):
        torch.manual_seed(0)
        change(module, weight_name(kind))
    with torch.no_grad():  # and an optimizer's step after the change
        for parameter in [*theirs.parameters(), *ours.parameters()]:
            parameter.mul_(0.9)
    for _ in range(2):
        with ran(*KERNELS):
            actual = run(ours, input)
        assert_same(actual, run(theirs, input))
    assert not torch.allclose(actual["result 0"], before)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_functional_call_uses_the_given_weights_and_only_then(kind):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    plain = flat(ours(input))
    weights = {n: (2 * p).detach().requires_grad_() for n, p in ours.named_parameters()}
    results = []
    for module in (theirs, ours):
        output = flat(torch.func.functional_call(module, weights, (input,)))
        results.append([*output, *torch.autograd.grad(output[0].sum(), weights.values())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert all(map(torch.equal, flat(ours(input)), plain))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_per_sample_gradients_by_vmap(kind):
    module = build(modules, kind, I, H, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    inputs = random_input(4, *((T,) if kind in LAYERS else ()), 1, I)

    def loss(weights, input):
        return flat(torch.func.functional_call(module, weights, (input,)))[0].square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, inputs)
    for i, input in enumerate(inputs):
        one = torch.func.grad(loss)(weights, input)
        torch.testing.assert_close({k: v[i] for k, v in together.items()}, one)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_forward_mode_agrees_with_reverse_mode(kind):
    module = build(modules, kind, I, H, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    tangents = {name: torch.ones_like(w) for name, w in weights.items()}

    def loss(weights):
        return flat(torch.func.functional_call(module, weights, (input,)))[0].square().sum()

    forward = torch.func.jvp(loss, (weights,), (tangents,))[1]
    reverse = sum(grad.sum() for grad in torch.func.grad(loss)(weights).values())
    torch.testing.assert_close(forward, reverse)


@pytest.mark.parametrize("kind", LAYERS)
def test_data_parallel_replica_uses_its_own_weights(kind):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in theirs.named_parameters():
        setattr(replica, name, 2 * parameter)
        parameter.data.mul_(2)
    input = random_input(T, B, I)
    with ran("kernel_forward"):
        actual = flat(replica(input))
    torch.testing.assert_close(actual, flat(theirs(input)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_subclass_may_call_forward_of_its_base(kind):
    theirs, ours = pair(kind, I, H, dtype=torch.float64)

    class Scaled(type(ours)):
        def forward(self, input, hx=None):
            return super().forward(3 * input, hx)

    ours.__class__ = Scaled
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    torch.testing.assert_close(flat(ours(input)), flat(theirs(3 * input)))


# Autograd


def layer_and_input(kind, **options):
    layer = build(modules, kind, I, H, dtype=torch.float64, **options)
    return layer, random_input(T, B, I).requires_grad_()


def gradients(loss, module, input, **options):
    return torch.autograd.grad(loss, [input, *module.parameters()], **options)


@pytest.mark.parametrize(
    ("kind", "which"), [(kind, which) for kind in LAYERS for which in (0, 1)] + [("LSTM", 2)]
)
def test_backward_from_one_result_alone(kind, which):
    losses = []
    for module in pair(kind, I, H, 2, bidirectional=True, dtype=torch.float64):
        input = random_input(T, B, I).requires_grad_()
        loss = flat(module(input))[which].square().sum()
        losses.append(gradients(loss, module, input))
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_backward_needs_retain_graph(kind):
    layer, input = layer_and_input(kind, num_layers=2)
    loss = layer(input)[0].square().sum()
    first = gradients(loss, layer, input, retain_graph=True)
    second = gradients(loss, layer, input)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, layer, input)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_only_what_requires_grad_gets_a_gradient(kind):
    names = [name for name, _ in build(nn, kind, I, H).named_parameters()]
    for trained in (*names, None):
        results = []
        for module in pair(kind, I, H, dtype=torch.float64):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name == trained)
            input = random_input(*((T,) if kind in LAYERS else ()), B, I)
            input.requires_grad_(trained is None)
            flat(module(input))[0].square().sum().backward()
            results.append({n: p.grad for n, p in module.named_parameters()} | {None: input.grad})
        theirs, ours = results
        assert [n for n, grad in ours.items() if grad is not None] == [trained]
        torch.testing.assert_close(ours[trained], theirs[trained], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_module_on_plain_input_makes_no_graph(kind):
    layer, input = layer_and_input(kind)
    layer.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(layer(input.detach())))


@pytest.mark.parametrize("kind", LAYERS)
def test_final_states_may_be_changed_before_backward(kind):
    results = []
    for module in pair(kind, I, H, 2, dtype=torch.float64):
        input = random_input(T, B, I).requires_grad_()
        output, *finals = flat(module(input))
        for final in finals:
            final.mul_(2)
        loss = output.square().sum() + sum(f.square().sum() for f in finals)
        results.append(gradients(loss, module, input))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["GRU", "RNN_tanh", "RNN_relu"])
def test_output_may_be_changed_before_backward(kind):
    results = []
    for module in pair(kind, I, H, 2, dtype=torch.float64):
        input = random_input(T, B, I).requires_grad_()
        output, h_n = module(input)
        loss = output.add_(1).relu_().square().sum() + h_n.sum()
        results.append(gradients(loss, module, input))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_input_changed_before_backward_is_an_error(kind):
    layer, leaf = layer_and_input(kind)
    input = leaf.clone()
    output = layer(input)[0]
    input.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_saved_tensors_pass_through_hooks(kind):
    module = build(modules, kind, I, H, dtype=torch.float64)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I).requires_grad_()
    expected = gradients(flat(module(input))[0].square().sum(), module, input)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flat(module(input))[0].square().sum()
    assert packed
    actual = gradients(loss, module, input)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("kind", LAYERS)
def test_checkpoint_replays_the_same_gradients(kind):
    layer, input = layer_and_input(kind, num_layers=2, dropout=0.5)
    torch.manual_seed(0)
    expected = gradients(layer(input)[0].square().sum(), layer, input)
    torch.manual_seed(0)
    output = torch.utils.checkpoint.checkpoint(layer, input, use_reentrant=False)[0]
    actual = gradients(output.square().sum(), layer, input)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_nothing_is_saved_without_grad(kind, grad_mode):
    def pack(tensor):
        raise AssertionError("a tensor was saved")

    theirs, ours = pair(kind, I, H, dtype=torch.float64)
    input = random_input(*((T,) if kind in LAYERS else ()), B, I)
    with grad_mode(), torch.autograd.graph.saved_tensors_hooks(pack, pack), ran("kernel_forward"):
        actual = flat(ours(input))
    assert not any(t.requires_grad for t in actual)
    assert all(t.is_inference() == (grad_mode is torch.inference_mode) for t in actual)
    expected = [t.detach() for t in flat(theirs(input))]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_first_and_second_derivatives(kind):
    options = {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    module = build(modules, kind, 2, 3, dtype=torch.float64, **options)
    lead = (3, 2) if kind in LAYERS else (2,)
    hx = flat(states(kind, *((4, 2) if kind in LAYERS else (2,)), 3))
    inputs = [random_input(*lead, 2), *hx]
    names = [name for name, _ in module.named_parameters()]

    def function(input, *rest):
        hx, weights = rest[: len(inputs) - 1], rest[len(inputs) - 1 :]
        hx = hx if len(hx) == 2 else hx[0]
        return tuple(
            flat(
                torch.func.functional_call(
                    module, dict(zip(names, weights, strict=True)), (input, hx)
                )
            )
        )

    arguments = [t.detach().requires_grad_() for t in (*inputs, *module.parameters())]
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


WRONG_WEIGHTS = {
    "weight_ih of another input size": ("weight_ih_l0", lambda w: w[:, :1]),
    "weight_hh of another hidden size": ("weight_hh_l0", lambda w: w[:-1, :-1]),
    "one element for weight_hh": ("weight_hh_l0", lambda w: w[:1, 0]),
    "short bias_ih": ("bias_ih_l0", lambda w: w[:1]),
    "short bias_hh": ("bias_hh_l0", lambda w: w[:-1]),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_of_a_wrong_shape_never_reach_a_kernel(kind, case):
    name, change = WRONG_WEIGHTS[case]
    _, ours = pair(kind, I, H)
    setattr(ours, name, nn.Parameter(change(getattr(ours, name).detach())))
    with ran(), pytest.raises(RuntimeError, match=rf"{name[:-3]} must be \[.*\], got \["):
        ours(torch.randn(T, B, I))


def test_a_layer_that_the_kernels_refuse_late_draws_no_dropout_again():
    theirs, ours = pair("LSTM", I, H, num_layers=2, dropout=0.5)
    for module in (theirs, ours):
        weight = module.weight_hh_l1.data
        module.weight_hh_l1.data = torch._neg_view(weight.neg())
    input = torch.randn(T, B, I)
    torch.manual_seed(5)
    expected = theirs(input)[0]
    torch.manual_seed(5)
    with ran("kernel_forward", "reference"):
        actual = ours(input)[0]
    torch.testing.assert_close(actual, expected)


def test_tensors_without_memory_never_reach_a_kernel():
    theirs, ours = pair("GRU", I, H)
    zero = torch._efficientzerotensor(T, B, I)
    with ran("torch"):
        assert torch.equal(ours(zero)[0], theirs(zero)[0])
    freed = torch.randn(T, B, I)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError), ran():
        ours(freed)


def test_a_function_mode_that_wraps_results():
    class Tagged(torch.Tensor):
        pass

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result.as_subclass(Tagged) if type(result) is torch.Tensor else result

    theirs, ours = pair("GRU", I, H)
    input = torch.randn(T, B, I)
    with Mode(), torch.no_grad():
        actual = ours(input)[0]
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), theirs(input)[0].detach())


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_mode_with_gradients_enabled(kind):
    _, ours = pair(kind, I, H)
    input = torch.randn(T, B, I)
    with torch.inference_mode(), torch.enable_grad(), ran("kernel_forward"):
        assert not ours(input)[0].requires_grad


@pytest.mark.parametrize("kind", LAYERS)
def test_a_missing_weight_is_an_error_and_a_changed_hidden_size_counts_for_nothing(kind):
    _, ours = pair(kind, I, H)
    ours.weight_hh_l0 = None
    with ran(), pytest.raises((TypeError, RuntimeError)):
        ours(torch.randn(T, B, I))
    _, ours = pair(kind, I, H)
    x = torch.randn(T, B, I)
    expected = ours(x)[0]
    for hidden_size in (3, 60, 100000):
        ours.hidden_size = hidden_size
        assert torch.equal(ours(x)[0], expected)


def test_annotations_can_be_evaluated():
    for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
        typing.get_type_hints(getattr(modules, name).forward)


def test_wrong_keywords_and_states_are_told():
    with pytest.raises(ValueError, match="give a reset_mask"):
        modules.GRU(2, 3)(torch.zeros(4, 1, 2), reset_to_hx=True)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(2, 2)])
    for input, hx in ((torch.zeros(4, 2), torch.tensor(0.0)), (packed, (torch.zeros(1, 1, 3),))):
        theirs, ours = (
            raised(lambda n=n, i=input, h=hx: n.LSTM(2, 3)(i, h if i is packed else (h, h)))
            for n in (nn, modules)
        )
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
