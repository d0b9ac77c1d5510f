"""patched: which modules become fusedrnn's, what they are afterwards, and what torch.nn is then."""

import copy
import inspect
import pickle
import threading
import warnings
from contextlib import ExitStack

import pytest
import torch
from helpers import LAYERS, assert_same, build, flat, raised, ran, run, states
from torch import nn
from torch.nn import GRU as GRU_IMPORTED_BEFORE

import fusedrnn
from fusedrnn import modules, patched, patching

NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
KINDS = (*LAYERS, "LSTMCell", "GRUCell", "RNNCell_tanh", "RNNCell_relu")


def torch_nn():
    """Everything in torch.nn's namespaces and in its recurrent classes, in order, by identity."""
    spaces = [nn, nn.modules, nn.modules.rnn, *(getattr(nn, name) for name in NAMES)]
    by_torch = ("__warningregistry__", "__annotations__")  # set by its warnings and its scripting
    return [(n, id(v)) for space in spaces for n, v in vars(space).items() if n not in by_torch]


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was():
    before = torch_nn()
    yield
    assert torch_nn() == before


class Tagger(nn.Module):
    """As third-party code has it: asks for the class, before and after the constructor returns."""

    def __init__(self, make):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.rnn = make(5, 6)
        self.head = nn.Linear(6, 3)
        self.apply(self.initialize)

    def initialize(self, module):
        if isinstance(module, (nn.LSTM, nn.GRU)):
            nn.init.zeros_(module.bias_ih_l0)

    def forward(self, tokens):
        input = torch.relu(self.embedding(tokens))
        output, hx = self.rnn(input)
        h_n = hx[0] if isinstance(self.rnn, nn.LSTM) else hx
        return torch.relu(self.head(output)) + self.head(h_n)


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class OwnConstructor(nn.GRU):
    def __init__(self, size):
        super().__init__(size, size)


def tokens():
    return torch.randint(11, (7, 3), generator=torch.Generator().manual_seed(0))


def tagger(make=nn.LSTM):
    torch.manual_seed(0)
    return Tagger(make)


@pytest.mark.parametrize("kind", KINDS)
def test_built_inside_computes_by_the_kernels_what_torch_computes(kind):
    expected = build(nn, kind, 3, 4, dtype=torch.float64)
    with patched():
        module = build(nn, kind, 3, 4, dtype=torch.float64)
    name = kind.partition("_")[0]
    assert isinstance(module, getattr(nn, name))
    assert isinstance(module, getattr(fusedrnn, name))
    assert repr(module) == repr(expected)
    assert module.state_dict().keys() == expected.state_dict().keys()
    shape = (2,) if "Cell" in kind else (5, 2)
    input = torch.randn(*shape, 3, dtype=torch.float64)
    hx = states(kind, *(() if "Cell" in kind else (1,)), 2, 4)
    with ran("kernel_forward", "kernel_backward"):
        actual = run(module, input, hx)
    assert_same(actual, run(expected, input, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_all_that_a_layer_can_be(kind):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.3}
    expected = build(nn, kind, 3, 4, dtype=torch.float64, **options)
    with patched():
        module = build(nn, kind, 3, 4, dtype=torch.float64, **options)
    input = torch.randn(2, 5, 3, dtype=torch.float64)
    with ran("kernel_forward", "kernel_backward"):
        actual = run(module, input)
    assert_same(actual, run(expected, input))


def test_a_class_that_was_imported_before_is_reached():
    assert type(GRU_IMPORTED_BEFORE(3, 4)) is nn.GRU
    with patched():
        assert type(GRU_IMPORTED_BEFORE(3, 4)) is patching.GRU
        assert type({"gru": nn.modules.rnn.GRU}["gru"](3, 4)) is patching.GRU
    assert type(GRU_IMPORTED_BEFORE(3, 4)) is nn.GRU


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_code_that_asks_for_the_class_gets_torchs_answer(make):
    expected = tagger(make)
    with patched():
        model = tagger(make)
        with ran("kernel_forward"):
            inside = model(tokens())
    assert not model.rnn.bias_ih_l0.any()
    with ran("kernel_forward"):
        outside = model(tokens())
    torch.testing.assert_close(inside, expected(tokens()), rtol=5e-5, atol=5e-5)
    assert torch.equal(inside, outside)


def test_what_was_built_before_stays_copied_and_unpickled_too():
    model = tagger()
    pickled = pickle.dumps(model)
    with patched():
        for one in (model, copy.deepcopy(model), pickle.loads(pickled)):
            assert type(one.rnn) is nn.LSTM
            with ran():
                one(tokens())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_of_what_was_built_inside(copied):
    with patched():
        model = tagger()
    twin = copied(model)
    assert type(twin.rnn) is patching.LSTM
    assert torch.equal(twin(tokens()), model(tokens()))


def test_subclasses_are_left_alone():
    with patched():
        own_forward, own_constructor = OwnForward(3, 4), OwnConstructor(3)

        class Inside(nn.RNNCell):
            pass

        inside = Inside(3, 4)
    assert type(own_forward) is OwnForward
    assert type(own_constructor) is OwnConstructor
    assert Inside.__bases__ == (nn.RNNCell,)
    with ran():
        own_forward(torch.zeros(5, 2, 3))
        own_constructor(torch.zeros(5, 2, 3))
        inside(torch.zeros(2, 3))


def test_fusedrnns_own_modules_are_what_they_are():
    with patched():
        for name in NAMES:
            module = getattr(fusedrnn, name)(3, 4)
            assert type(module) is getattr(modules, name)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_calls_that_are_torchs_stay_torchs_inside():
    input = torch.randn(5, 2, 3, dtype=torch.complex64)
    expected = build(nn, "LSTM", 3, 4, dtype=torch.complex64)
    with patched():
        module = build(nn, "LSTM", 3, 4, dtype=torch.complex64)
        with ran("torch"):
            actual = flat(module(input))
    for a, b in zip(actual, flat(expected(input)), strict=True):
        assert torch.equal(a, b)


def test_what_torch_has_not():
    with patched():
        module = nn.LSTM(3, 4)
    input = torch.randn(5, 2, 3)
    with ran("kernel_forward"):
        _, _, cells = module(input, lengths=[2, 5], return_cell_states=True)
    assert cells.shape == (5, 2, 4)


def test_constructors_errors_and_signatures_are_torchs():
    calls = [
        lambda: nn.RNN(3, 4, nonlinearity="sine"),
        lambda: nn.GRU(3, 4, proj_size=2),
        lambda: nn.LSTM(3),
        lambda: nn.LSTM(3, 0),
        lambda: nn.LSTMCell(3, 4, hidden=1),
    ]
    expected = [raised(call) for call in calls]
    signatures = [inspect.signature(getattr(nn, name)) for name in NAMES]
    with patched():
        actual = [raised(call) for call in calls]
        assert [inspect.signature(getattr(nn, name)) for name in NAMES] == signatures
        assert nn.RNN(3, 4, 1, "relu").nonlinearity == "relu"
    assert list(map(repr, actual)) == list(map(repr, expected))


def test_torch_is_whole_again_after_an_exception_and_nesting():
    before = torch_nn()

    @patched()
    def build_and_fail():
        assert torch_nn() != before
        with patched():
            assert type(nn.LSTM(3, 4)) is patching.LSTM
        assert type(nn.LSTM(3, 4)) is patching.LSTM
        raise KeyError

    assert type(raised(build_and_fail)) is KeyError
    assert torch_nn() == before
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_two_that_overlap_without_nesting():
    first, second = ExitStack(), ExitStack()
    first.enter_context(patched())
    second.enter_context(patched())
    first.close()
    assert type(nn.LSTM(3, 4)) is patching.LSTM
    second.close()
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_other_threads_build_them_too():
    made = []
    with patched():
        thread = threading.Thread(target=lambda: made.append(nn.LSTM(3, 4)))
        thread.start()
        thread.join()
    assert type(made[0]) is patching.LSTM


def test_a_constructor_put_over_ours_is_kept_and_ours_ends():
    original, seen = nn.LSTM.__init__, []
    with patched():
        ours = nn.LSTM.__init__

        def theirs(self, *args, **kwargs):
            seen.append(args)
            ours(self, *args, **kwargs)

        nn.LSTM.__init__ = theirs
    try:
        assert nn.LSTM.__init__ is theirs
        assert type(nn.LSTM(3, 4)) is nn.LSTM
        assert seen == [(3, 4)]
    finally:
        nn.LSTM.__init__ = original


def test_restore_and_replace_take_what_was_built_inside():
    with patched():
        model = nn.ModuleList([nn.LSTM(3, 4), nn.GRUCell(3, 4)])
    parameters = list(model.parameters())
    assert fusedrnn.replace(model).replaced == [("0", "fusedrnn.patching.LSTM", "fusedrnn.LSTM")]
    assert type(model[0]) is modules.LSTM
    with patched():
        model[0] = nn.LSTM(3, 4)
    assert fusedrnn.restore(model).replaced == [
        ("0", "fusedrnn.patching.LSTM", "torch.nn.LSTM"),
        ("1", "fusedrnn.GRUCell", "torch.nn.GRUCell"),
    ]
    assert [type(m) for m in model] == [nn.LSTM, nn.GRUCell]
    assert model[1].weight_ih is parameters[4]


@pytest.mark.parametrize("kind", LAYERS)
def test_export_knows_the_names_of_their_arguments(kind):
    with patched():
        module = build(nn, kind, 3, 4)
    sizes = {"input": {1: torch.export.Dim("batch")}}
    program = torch.export.export(module, (torch.randn(5, 2, 3),), dynamic_shapes=sizes)
    x = torch.randn(5, 3, 3)
    assert all(map(torch.equal, flat(program.module()(x)), flat(build(nn, kind, 3, 4)(x))))


def test_explain_knows_them():
    with patched():
        module = nn.GRU(3, 4)
    assert fusedrnn.explain(module, torch.randn(5, 2, 3)).startswith("kernels")


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_compiled_after_the_block_they_run_the_kernels(name):
    with patched():
        model = tagger(getattr(nn, name))
    expected = model(tokens())
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def compiled():
        torch._dynamo.reset()
        graphs.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Dynamo does not know how to trace")  # our functions
            output = torch.compile(model, backend=backend)(tokens())
        torch.testing.assert_close(output, expected)
        return len(graphs)

    with ran("kernel_forward"):
        assert compiled() == 1  # what stands before the layer, as with torch.nn's
    fusedrnn.replace(model)
    if name != "LSTM":  # whose hx this model takes apart only if it is torch.nn's for isinstance
        with ran("kernel_forward"):
            assert compiled() == 1  # the whole model
        assert torch.compile(model, fullgraph=True, backend="eager")(tokens()) is not None
    fusedrnn.restore(model)
    with ran():
        assert compiled() == 1


def test_exported_program_has_torchs_operation():
    with patched():
        module = nn.LSTM(3, 4)
    input = torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(module, (input,)).graph
    assert "aten.lstm.input" in str(graph)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_inside_it_is_torchs():
    with patched():
        module = nn.LSTM(3, 4)
        scripted = torch.jit.script(nn.Sequential(module))
    input = torch.randn(5, 2, 3)
    fusedrnn.restore(module)
    assert torch.equal(scripted(input)[0], module(input)[0])
