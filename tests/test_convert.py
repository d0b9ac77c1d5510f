"""replace and restore on whole models: what changes, what stays, and what the report says."""

import copy
import pickle

import pytest
import torch
from helpers import LAYERS, assert_same, build, flat, raised, ran, run
from torch import nn
from torch.nn.utils import parametrizations

import fusedrnn.modules as fused
from fusedrnn.convert import Report, replace, restore

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


class Tagger(nn.Module):
    """Embedding, two stacked layers of different kinds, a cell, linear."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.encoder = nn.ModuleDict({"low": nn.GRU(5, 6, dropout=0.2, num_layers=2)})
        self.high = nn.LSTM(6, 4, bidirectional=True)
        self.cell = nn.RNNCell(8, 3)
        self.head = nn.Linear(3, 11)

    def forward(self, tokens):
        output = self.high(self.encoder["low"](self.embedding(tokens))[0])[0]
        return self.head(torch.stack([self.cell(step) for step in output]))


TAGGER_REPLACED = [
    ("encoder.low", "torch.nn.GRU", "fusedrnn.GRU"),
    ("high", "torch.nn.LSTM", "fusedrnn.LSTM"),
    ("cell", "torch.nn.RNNCell", "fusedrnn.RNNCell"),
]


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options)


def tokens():
    return torch.randint(11, (7, 3), generator=torch.Generator().manual_seed(0))


def train(model, optimizer, steps=4):
    """The losses of a few steps on one batch, with dropout."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def types(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_a_recurrent_module_itself(name):
    model, twin = (seeded(getattr(nn, name), 3, 4, dtype=torch.float64) for _ in range(2))
    report = replace(model)
    assert type(model) is getattr(fused, name)
    assert report.replaced == [("", f"torch.nn.{name}", f"fusedrnn.{name}")]
    assert report.skipped == []
    input = torch.randn(*(() if name.endswith("Cell") else (5,)), 2, 3, dtype=torch.float64)
    with ran("kernel_forward", "kernel_backward"):
        actual = run(model, input)
    assert_same(actual, run(twin, input))


def test_optimizer_made_before_goes_on_training_as_with_torch():
    losses = []
    for convert in (lambda model: None, replace):
        model = seeded(Tagger).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        before = train(model, optimizer)
        convert(model)
        losses.append(before + train(model, optimizer))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    assert losses[1][-1] < losses[1][0]


def test_replace_and_restore_keep_modules_parameters_and_types():
    model = seeded(Tagger)
    original, modules = types(model), list(model.modules())
    parameters = dict(model.named_parameters())
    report = replace(model)
    assert report.replaced == TAGGER_REPLACED
    assert [type(m) for m in (model.encoder["low"], model.high, model.cell)] == [
        fused.GRU,
        fused.LSTM,
        fused.RNNCell,
    ]
    report = restore(model)
    assert report.replaced == [(name, new, old) for name, old, new in TAGGER_REPLACED]
    assert report.skipped == []
    assert types(model) == original
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(parameters[name] is p for name, p in model.named_parameters())
    with ran():  # torch.nn again, in no way ours
        model(tokens())


def test_restored_module_computes_what_torch_computes():
    lstm, twin = (seeded(nn.LSTM, 3, 4, 2, dtype=torch.float64) for _ in range(2))
    replace(lstm)
    with torch.no_grad():
        for parameter in (*lstm.parameters(), *twin.parameters()):
            parameter.mul_(2)
    restore(lstm)
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    assert all(map(torch.equal, flat(lstm(input)), flat(twin(input))))


@pytest.mark.parametrize("kind", LAYERS)
def test_mode_dtype_attributes_and_requires_grad_stay(kind):
    layer = build(nn, kind, 3, 4, 2, dropout=0.5, batch_first=True, dtype=torch.float64).eval()
    layer.weight_hh_l0.requires_grad_(False)
    layer.note = "kept"
    layer.register_buffer("extra", torch.ones(2))
    state = dict(vars(layer))
    replace(layer)
    assert vars(layer) == state
    assert not layer.training
    assert layer.note == "kept"
    assert not layer.weight_hh_l0.requires_grad
    assert layer.weight_ih_l0.dtype == torch.float64


def test_hooks_of_every_kind_go_on_firing():
    lstm, fired = nn.LSTM(3, 4), []
    lstm.register_forward_pre_hook(lambda *_: fired.append("forward_pre"))
    lstm.register_forward_hook(lambda *_: fired.append("forward"))
    lstm.register_full_backward_hook(lambda *_: fired.append("backward"))
    lstm.register_state_dict_post_hook(lambda *_: fired.append("state_dict"))
    lstm.register_load_state_dict_post_hook(lambda *_: fired.append("load_state_dict"))
    lstm.weight_hh_l0.register_hook(lambda grad: fired.append("grad"))
    replace(lstm)
    with ran("kernel_forward", "kernel_backward"):
        lstm(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    lstm.load_state_dict(lstm.state_dict())
    assert sorted(fired) == sorted(
        ["forward_pre", "forward", "backward", "state_dict", "load_state_dict", "grad"]
    )


def test_shared_module_is_replaced_everywhere_and_reported_once():
    gru = nn.GRU(4, 4)
    model = nn.ModuleDict({"first": gru, "second": nn.ModuleList([gru])})
    model.held = [gru]  # a reference that no module knows of
    report = replace(model)
    assert [name for name, *_ in report.replaced] == ["first"]
    assert model["first"] is model["second"][0] is model.held[0] is gru
    assert type(gru) is fused.GRU


def test_tied_weights_stay_tied():
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    replace(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    model[1](model[0](torch.randn(5, 2, 4))[0])[0].sum().backward()
    assert len(list(model.parameters())) == 7


def test_filter_chooses_by_name_and_module():
    model, asked = seeded(Tagger), []

    def only_lstm(name, module):
        asked.append((name, module))
        return isinstance(module, nn.LSTM)

    report = replace(model, only_lstm)
    assert asked == [
        ("encoder.low", model.encoder["low"]),
        ("high", model.high),
        ("cell", model.cell),
    ]
    assert report.replaced == [TAGGER_REPLACED[1]]
    assert report.skipped == [
        ("encoder.low", "torch.nn.GRU", "filter_fn refused it"),
        ("cell", "torch.nn.RNNCell", "filter_fn refused it"),
    ]
    assert type(model.encoder["low"]) is nn.GRU


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnMethod(nn.GRUCell):
    def describe(self):
        return "a cell"


class FusedSubclass(fused.LSTM):
    pass


def test_subclasses_are_left_alone_and_reported():
    model = nn.ModuleList([OwnForward(3, 4), OwnMethod(3, 4), FusedSubclass(3, 4)])
    original = types(model)
    report = replace(model)
    assert report.replaced == []
    (_, name, reason), (_, method_name, method_reason), (_, _, fused_reason) = report.skipped
    assert name == f"{__name__}.OwnForward"
    assert reason == "a subclass of torch.nn.LSTM with its own forward"
    assert method_name == f"{__name__}.OwnMethod"
    assert method_reason == (
        "a subclass of torch.nn.GRUCell; derive it from fusedrnn.GRUCell instead"
    )
    assert fused_reason == "already fusedrnn's"
    assert [name for name, *_ in report.skipped] == ["0", "1", "2"]
    report = restore(model)
    assert report.replaced == []
    assert [name for name, *_ in report.skipped] == ["2"]
    assert "derive it from torch.nn.LSTM instead" in report.skipped[0][2]
    assert types(model) == original


def test_forward_set_on_the_instance_is_left_alone():
    lstm = nn.LSTM(3, 4)
    lstm.forward = lambda input: "wrapped"
    assert replace(lstm).skipped == [("", "torch.nn.LSTM", "its forward was set on the instance")]
    assert lstm(torch.zeros(5, 2, 3)) == "wrapped"


def test_replacing_twice_changes_nothing_more():
    model = seeded(Tagger)
    replace(model)
    report = replace(model)
    assert report.replaced == []
    assert [reason for *_, reason in report.skipped] == ["already fusedrnn's"] * 3


def test_a_model_without_recurrent_modules():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert replace(model) == Report() == restore(model)
    assert str(replace(model)) == "0 replaced, 0 skipped"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_module_is_left_alone_and_reported():
    model = nn.ModuleDict({"rnn": torch.jit.script(nn.Sequential(nn.LSTM(3, 4)))})
    (skipped,) = replace(model).skipped
    assert skipped[0] == "rnn.0"
    assert skipped[2] == "compiled by torch.jit.script"


def test_report_is_readable():
    model = seeded(Tagger)
    model.own = OwnForward(3, 4)
    report = replace(model)
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "3 replaced, 1 skipped",
        "  encoder.low: torch.nn.GRU -> fusedrnn.GRU",
        "  high: torch.nn.LSTM -> fusedrnn.LSTM",
        "  cell: torch.nn.RNNCell -> fusedrnn.RNNCell",
        f"  own: {__name__}.OwnForward left alone: "
        "a subclass of torch.nn.LSTM with its own forward",
    ]
    assert "(the model itself): torch.nn.GRU -> fusedrnn.GRU" in str(replace(nn.GRU(3, 4)))


@pytest.mark.parametrize("convert", [replace, restore])
@pytest.mark.parametrize("model", [None, {"rnn": 1}, nn.LSTM, [nn.Linear(1, 1)]], ids=repr)
def test_model_of_another_type_is_an_error(convert, model):
    error = raised(lambda: convert(model))
    assert type(error) is TypeError
    assert str(error) == f"model must be a torch.nn.Module, got {type(model).__name__}"


@pytest.mark.parametrize("filter_fn", ["high", ["high"], True])
def test_filter_of_another_type_is_an_error_and_changes_nothing(filter_fn):
    model = seeded(Tagger)
    with pytest.raises(TypeError, match=rf"filter_fn must be .* got {type(filter_fn).__name__}"):
        replace(model, filter_fn)
    assert type(model.high) is nn.LSTM


def test_a_filter_that_raises_changes_nothing():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4)])
    with pytest.raises(ZeroDivisionError):
        replace(model, lambda name, _: 1 / (1 - int(name)) > 0)
    assert [type(module) for module in model] == [nn.LSTM, nn.GRU]


def weight_normed(name):
    module = seeded(getattr(nn, name), 3, 4, dtype=torch.float64)
    weight = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    return parametrizations.weight_norm(module, weight), weight


@pytest.mark.parametrize("name", NAMES)
def test_parametrized_modules_are_replaced_and_restored(name):
    (module, weight), (twin, _) = weight_normed(name), weight_normed(name)
    copied = copy.deepcopy(module)  # of the same class, made by torch, which must not change
    input = torch.randn(*(() if name.endswith("Cell") else (5,)), 2, 3, dtype=torch.float64)
    assert replace(module).replaced == [("", f"torch.nn.{name}", f"fusedrnn.{name}")]
    assert isinstance(module, getattr(fused, name))
    assert not isinstance(copied, getattr(fused, name))
    for model in (module, twin):  # the weight is computed anew from what an optimizer moves
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    for converted in (module, copy.deepcopy(module)):
        with ran("kernel_forward", "kernel_backward"):
            actual = run(converted, input)
        assert_same(actual, run(twin, input))
    assert restore(module).replaced == [("", f"fusedrnn.{name}", f"torch.nn.{name}")]
    assert_same(run(module, input), run(twin, input))
    replace(module)
    nn.utils.parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(fused, name)
    with ran("kernel_forward"), torch.no_grad():
        actual = flat(module(input))
    torch.testing.assert_close(actual, flat(twin(input)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_replaced_model_copies_and_restores(copied):
    model = seeded(Tagger).eval()
    expected = model(tokens())
    replace(model)
    twin = copied(model)
    assert types(twin) == types(model)
    torch.testing.assert_close(twin(tokens()), expected, rtol=5e-5, atol=5e-5)
    restore(twin)
    assert torch.equal(twin(tokens()), expected)
    assert type(model.high) is fused.LSTM


def test_state_dict_is_the_same_before_and_after():
    model = seeded(Tagger)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replace(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after._metadata.keys() == seeded(Tagger).state_dict()._metadata.keys()


def test_model_replaced_after_compilation_runs_the_kernels():
    model = seeded(Tagger).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(tokens())
    replace(compiled)
    with ran("kernel_forward"):
        actual = compiled(tokens())
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


def test_data_parallel_wrapper_is_walked():
    model = nn.DataParallel(nn.LSTM(3, 4))
    assert replace(model).replaced == [("module", "torch.nn.LSTM", "fusedrnn.LSTM")]
