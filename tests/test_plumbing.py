"""What training frameworks and user code do around a module: each against the torch.nn module that
went through the same, and with who computed it. The simpler cases, and changes of one weight, are
in tests/test_modules.py; whole models in tests/test_convert.py."""

import copy
import datetime
import warnings
from abc import ABC, abstractmethod

import pytest
import torch
import torch.multiprocessing
from helpers import CELLS, LAYERS, assert_same, build, flat, pair, raised, ran, run, states
from torch import distributed, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_map

import fusedrnn
from fusedrnn import modules, ops

KERNELS = ("kernel_forward", "kernel_backward")
T, B, I, H = 6, 3, 5, 7  # noqa: E741
ALL = pytest.mark.parametrize("kind", LAYERS + CELLS)


pytestmark = pytest.mark.usefixtures("one_thread")


def input_of(kind, *lead, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    lead = lead or ((T, B) if kind in LAYERS else (B,))
    return torch.randn(*lead, I, dtype=dtype, generator=generator)


def weight_of(kind):
    return "weight_hh_l0" if kind in LAYERS else "weight_hh"


def both(kind, **options):
    """(torch.nn's, ours) in float64; layers have two of them and both directions."""
    if kind in LAYERS:
        options = {"num_layers": 2, "bidirectional": True, **options}
    return pair(kind, I, H, dtype=torch.float64, **options)


def assert_alike(theirs, ours, input, *arguments):
    """The same results and gradients, ours by the kernels."""
    with ran(*KERNELS):
        actual = run(ours, input, *arguments)
    assert_same(actual, run(theirs, input, *arguments))


# Weights that are no parameters


def spectral_norm(module, name):
    parametrizations.spectral_norm(module, name)
    module.eval()  # no power iteration in a forward pass


def old_spectral_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(module, name)
    module.eval()


def every_weight_normed(module, name):
    for weight in [n for n, _ in module.named_parameters() if n.startswith("weight")]:
        parametrizations.weight_norm(module, weight)


def every_parameter_scaled(module, name):
    class Scale(nn.Module):
        def forward(self, tensor):
            return 3 * tensor

    for parameter in [n for n, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, parameter, Scale())


@pytest.mark.parametrize(
    "change", [spectral_norm, old_spectral_norm, every_weight_normed, every_parameter_scaled]
)
@ALL
def test_computed_weights(kind, change):
    theirs, ours = both(kind)
    for module in (theirs, ours):
        torch.manual_seed(0)
        change(module, weight_of(kind))
    for _ in range(2):
        assert_alike(theirs, ours, input_of(kind))
        with torch.no_grad():
            for parameter in (*theirs.parameters(), *ours.parameters()):
                parameter.mul_(0.8)


@ALL
def test_cached_parametrizations(kind):
    theirs, ours = both(kind)
    for module in (theirs, ours):
        parametrizations.weight_norm(module, weight_of(kind))
    with parametrize.cached():
        with ran("kernel_forward"):
            actual = [flat(ours(input_of(kind))) for _ in range(2)]
        torch.testing.assert_close(actual[1], flat(theirs(input_of(kind))))
    assert all(map(torch.equal, *actual))


class WeightDrop(nn.Module):
    """Recurrent weights dropped out at each call, as fastai and awd-lstm-lm do it.

    `delete` takes the parameter out of the module, and `put` a tensor into its place.
    """

    def __init__(self, module, names, delete, put):
        super().__init__()
        self.module, self.names, self.put = module, names, put
        for name in names:
            raw = getattr(module, name)
            delete(module, name)
            self.register_parameter(f"{name}_raw", nn.Parameter(raw.data))
            if delete is delattr:
                setattr(module, name, raw.data.clone())
        module.flatten_parameters = lambda *args, **kwargs: None

    def forward(self, *arguments):
        for name in self.names:
            raw = getattr(self, f"{name}_raw")
            self.put(self.module, name, nn.functional.dropout(raw, 0.5, self.training))
        return self.module(*arguments)


def delete_behind(module, name):
    del module._parameters[name]


def put_behind(module, name, tensor):
    module._parameters[name] = tensor


@pytest.mark.parametrize(
    ("delete", "put"), [(delattr, setattr), (delete_behind, setattr), (delete_behind, put_behind)]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@ALL
def test_plain_tensors_over_parameters(kind, delete, put):
    names = ["weight_hh_l0", "weight_hh_l1"] if kind in LAYERS else ["weight_hh"]
    theirs, ours = (WeightDrop(module, names, delete, put) for module in both(kind))
    for _ in range(2):
        assert_alike(theirs, ours, input_of(kind))
    assert_alike(theirs.eval(), ours.eval(), input_of(kind))
    if kind in LAYERS:
        ours.module.flatten_parameters()


@pytest.mark.parametrize("kind", LAYERS)
def test_flat_weights_overwritten(kind):
    """torch takes them as long as no parameter is another object."""
    theirs, ours = both(kind)
    for module in (theirs, ours):
        module._flat_weights = [2 * w for w in module._flat_weights]
    assert_alike(theirs, ours, input_of(kind))


@pytest.mark.parametrize("tie_weights", [True, False])
@ALL
def test_functional_call_runs_the_kernels(kind, tie_weights):
    results = []
    for module in both(kind):
        weights = {n: (2 * p).detach().requires_grad_() for n, p in module.named_parameters()}
        with ran(*KERNELS if isinstance(module, modules._Fused) else ()):
            output = flat(
                torch.func.functional_call(
                    module, weights, (input_of(kind),), tie_weights=tie_weights
                )
            )
            results.append([*output, *torch.autograd.grad(output[0].sum(), weights.values())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@ALL
def test_replicas_of_data_parallel(kind):
    """As torch.nn.parallel.replicate makes them, which wants GPUs."""
    theirs, ours = both(kind)
    replica = ours._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in ours._parameters.items():
        setattr(replica, name, 2 * parameter)  # as from Broadcast: no leaf
        replica._former_parameters[name] = parameter
    with ran(*KERNELS):
        flat(replica(input_of(kind)))[0].square().sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    flat(theirs(input_of(kind)))[0].square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, 2 * other.grad, rtol=1e-10, atol=1e-10)
    if kind in CELLS:  # without biases
        cell = build(modules, kind, I, H, bias=False)
        replica = cell._replicate_for_data_parallel()
        replica._parameters.update(bias_ih=None, bias_hh=None)
        replica.weight_ih, replica.weight_hh = (p * 1 for p in cell.parameters())
        input = input_of(kind, dtype=torch.float32)
        with ran("kernel_forward"):
            assert torch.equal(flat(replica(input))[0], flat(cell(input))[0])


# Weights that are shared, moved or replaced


@ALL
def test_tied_weights(kind):
    def tie(module):
        names = [n for n, _ in module.named_parameters()]
        if kind in LAYERS:  # both directions, and all biases
            module.weight_hh_l0_reverse = module.weight_hh_l1 = module.weight_hh_l0
        biases = [n for n in names if n.startswith("bias")]
        for name in biases[1:]:
            setattr(module, name, getattr(module, biases[0]))
        return module

    theirs, ours = map(tie, both(kind))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert_alike(theirs, ours, input_of(kind))
    assert_alike(theirs, copy.deepcopy(ours), input_of(kind))
    assert len(list(copy.deepcopy(ours).parameters())) == len(list(theirs.parameters()))


@ALL
def test_weights_tied_between_modules(kind):
    class Twice(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            setattr(second, weight_of(kind), getattr(first, weight_of(kind)))
            self.first, self.second = first, second

        def forward(self, input):
            return flat(self.first(input), self.second(input))

    theirs, ours = map(Twice, both(kind), both(kind, seed=1))
    assert_alike(theirs, ours, input_of(kind))


@ALL
def test_shallow_copies_share_the_weights(kind):
    theirs, ours = both(kind)
    twins = copy.copy(theirs), copy.copy(ours)
    with torch.no_grad():
        for module in (theirs, ours):
            for parameter in module.parameters():
                parameter.mul_(2)
    assert_alike(*twins, input_of(kind))
    assert all(a is b for a, b in zip(ours.parameters(), twins[1].parameters(), strict=True))


@ALL
def test_deep_copies_follow_their_own_weights(kind):
    theirs, ours = both(kind)
    twins = copy.deepcopy(theirs), copy.deepcopy(ours)
    for module in (theirs, ours):
        module.zero_grad()
        nn.init.zeros_(getattr(module, weight_of(kind)))
    for twin in twins:
        name = weight_of(kind)
        setattr(twin, name, nn.Parameter(3 * getattr(twin, name).detach()))
        for parameter in twin.parameters():
            parameter.data = parameter.data * 0.7
    assert_alike(*twins, input_of(kind))
    assert_alike(theirs, ours, input_of(kind))


@ALL
def test_averaged_model(kind):
    theirs, ours = both(kind)
    averaged = []
    for module in (theirs, ours):
        average = torch.optim.swa_utils.AveragedModel(module)
        for _ in range(2):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.5)
            average.update_parameters(module)
        averaged.append(average)
    assert_alike(*averaged, input_of(kind))


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@ALL
def test_conversions_that_swap_parameters(kind):
    theirs, ours = both(kind)
    kept = list(ours.parameters())
    for module in (theirs, ours):
        module.float().double()
    assert all(a is b for a, b in zip(ours.parameters(), kept, strict=True))
    assert_alike(theirs, ours, input_of(kind))
    state = {name: 2 * value for name, value in theirs.state_dict().items()}
    outcomes = []
    for module in (theirs, ours):
        try:
            module.load_state_dict(state)
            outcomes.append(None)
        except RuntimeError as error:  # torch's layers hold weak references
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]
    assert_alike(theirs, ours, input_of(kind))


@pytest.mark.parametrize("assign", [True, False])
@ALL
def test_load_state_dict(kind, assign):
    theirs, ours = both(kind)
    getattr(ours, weight_of(kind)).requires_grad_(False)
    getattr(theirs, weight_of(kind)).requires_grad_(False)
    state = {name: 2 * value for name, value in theirs.state_dict().items()}
    for module in (theirs, ours):
        module.load_state_dict(state, assign=assign)
        assert not getattr(module, weight_of(kind)).requires_grad
        module.requires_grad_()
    assert_alike(theirs, ours, input_of(kind))


@ALL
def test_meta_modules_get_their_weights_later(kind):
    theirs, _ = both(kind)
    options = {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    with torch.device("meta"):
        ours = build(modules, kind, I, H, dtype=torch.float64, **options)
        assert next(ours.parameters()).is_meta
        with ran("torch"):
            assert flat(ours(input_of(kind).to("meta")))[0].is_meta
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_alike(theirs, ours, input_of(kind))
    ours.to("meta").to_empty(device="cpu")
    torch.manual_seed(0)
    ours.reset_parameters()
    assert_alike(both(kind)[0], ours, input_of(kind))


@ALL
def test_default_device_meta(kind):
    theirs, ours = both(kind)
    input = input_of(kind)
    torch.set_default_device("meta")
    try:
        with torch.no_grad():
            with ran("kernel_forward"):
                actual = flat(ours(input))
            expected = flat(theirs(input))
        assert next(build(modules, kind, I, H).parameters()).is_meta
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@ALL
def test_shared_memory(kind):
    theirs, ours = (module.share_memory() for module in both(kind))
    assert all(p.is_shared() for p in ours.parameters())
    assert_alike(theirs, ours, input_of(kind))


# Training


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
        lambda p: torch.optim.Adam(p, 0.01, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    ],
    ids=["SGD-foreach", "Adam-foreach", "AdamW-fused", "LBFGS"],
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_tanh", "LSTMCell", "GRUCell", "RNNCell_tanh"])
def test_training_steps(kind, optimizer):
    vectors = []
    for module in both(kind):
        steps = optimizer(module.parameters())

        def closure(module=module, steps=steps):
            steps.zero_grad()
            loss = sum(result.square().sum() for result in flat(module(input_of(kind))))
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5, foreach=True)
            nn.utils.clip_grad_value_(module.parameters(), 0.3)
            return loss

        with ran(*KERNELS if isinstance(module, modules._Fused) else ()):
            for _ in range(3):
                steps.step(closure)
        vectors.append(nn.utils.parameters_to_vector(module.parameters()))
    torch.testing.assert_close(*vectors, rtol=1e-7, atol=1e-9)


@ALL
def test_parameters_that_are_views_of_one_vector(kind):
    theirs, ours = both(kind)
    for module in (theirs, ours):
        vector = nn.utils.parameters_to_vector(module.parameters())
        padded = torch.cat([vector.new_zeros(1), 2 * vector])[1:].detach()  # and not aligned
        nn.utils.vector_to_parameters(padded, module.parameters())
    assert_alike(theirs, ours, input_of(kind))


@ALL
def test_parameters_frozen_and_thawed(kind):
    theirs, ours = (module.requires_grad_(False) for module in both(kind))
    input = input_of(kind)
    with ran("kernel_forward"):
        assert not flat(ours(input))[0].requires_grad
    assert_alike(theirs, ours, input)  # the input's gradient alone
    for module in (theirs, ours):
        module.requires_grad_()
    assert_alike(theirs, ours, input)


# Hooks


@ALL
def test_forward_hooks_with_keywords(kind):
    results = []
    for module in both(kind):
        seen = []

        def before(module, args, kwargs, seen=seen):
            seen.append(("before", len(args), sorted(kwargs)))
            kwargs["input"] = 2 * kwargs["input"]
            return args, kwargs

        def after(module, args, kwargs, output, seen=seen):
            seen.append(("after", len(args), sorted(kwargs)))
            return tree_map(lambda t: t + 1, output)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
        lead = (4, B) if kind in LAYERS else (B,)
        with ran(*("kernel_forward",) if isinstance(module, modules._Fused) else ()):
            output = module(input=input_of(kind), hx=states(kind, *lead, H))
        results.append([seen, *flat(output)])
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1:], results[0][1:], rtol=1e-10, atol=1e-10)


@ALL
def test_backward_hooks_see_and_change_gradients(kind):
    results = []
    for module in both(kind):
        seen = []

        def before(module, grad_output, seen=seen):
            seen.append(grad_output)
            return tree_map(lambda g: g if g is None else 2 * g, grad_output)

        def after(module, grad_input, grad_output, seen=seen):
            seen.extend((grad_input, grad_output))
            return tree_map(lambda g: g if g is None else 3 * g, grad_input)

        module.register_full_backward_pre_hook(before)
        module.register_full_backward_hook(after)
        parameter = getattr(module, weight_of(kind))
        parameter.register_hook(lambda grad: 5 * grad)
        parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append((p.grad,)))
        with ran(*KERNELS if isinstance(module, modules._Fused) else ()):
            grads = run(module, input_of(kind))
        results.append([len(seen), *grads.values(), *flat(seen)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@ALL
def test_state_dict_hooks(kind):
    theirs, ours = both(kind)
    for module in (theirs, ours):
        module.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)
        module.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.update(
                {f"old.{name}": state.pop(name) for name in list(state)}
            )
        )
        module.register_load_state_dict_pre_hook(
            lambda module, state, *_: state.update(
                {name.removeprefix("old."): 2 * state.pop(name) for name in list(state)}
            )
        )
    state = copy.deepcopy(theirs.state_dict())
    assert list(ours.state_dict()) == list(state)
    for module in (theirs, ours):
        module.load_state_dict(state)
    assert_alike(theirs, ours, input_of(kind))


@ALL
def test_global_hooks(kind):
    seen = []
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append("before")),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("after")),
    ]
    try:
        with ran("kernel_forward"):
            both(kind)[1](input_of(kind))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == ["before", "after"]


# Classes of users


class Recurrent(ABC, nn.RNNBase):
    """A mixin above torch's base, as pytorch-forecasting has one."""

    @abstractmethod
    def doubled(self, hx): ...

    def forward(self, input, hx=None):
        output, hx = super().forward(input, hx)
        return output, self.doubled(hx)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_multiple_inheritance(name):
    def derive(base):
        class Derived(Recurrent, base):
            def doubled(self, hx):
                return tree_map(lambda h: 2 * h, hx)

        torch.manual_seed(0)
        return Derived(I, H, 2, batch_first=True, dtype=torch.float64)

    theirs, ours = derive(getattr(nn, name)), derive(getattr(fusedrnn, name))
    assert isinstance(ours, Recurrent)
    assert_alike(theirs, ours, input_of(name, B, T), states(name, 2, B, H))
    with pytest.raises(TypeError, match="abstract"):
        type("Abstract", (Recurrent, getattr(fusedrnn, name)), {})(I, H)


class Doubling(modules.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_be_scripted_is_an_error_and_not_wrong():
    normed = parametrizations.weight_norm(modules.LSTM(I, H), "weight_hh_l0")
    errors = (RuntimeError, OSError, torch.jit.frontend.NotSupportedError)
    for module in (Doubling(I, H), normed, Doubling(I, H).eval()):
        parent = nn.Sequential(module)
        assert isinstance(raised(lambda p=parent: torch.jit.script(p)), errors)
        assert parent[0] is module


@ALL
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_inside_a_parent(kind):
    _, ours = both(kind)
    expected = flat(ours(input_of(kind)))
    parent = nn.Sequential(ours)
    with pytest.warns(UserWarning, match="call fusedrnn.replace again"):
        scripted = torch.jit.script(parent)
    assert type(parent[0]) is ours._torch_class  # torch's doing
    torch.testing.assert_close(flat(scripted(input_of(kind))), expected, rtol=1e-10, atol=1e-10)


@ALL
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_hold_for_other_sizes(kind):
    _, ours = both(kind)
    with ran("torch"):
        traced = torch.jit.trace(ours, (input_of(kind),), check_trace=False)
    for lead in ((T, B), (1, 1), (T + 5, 2 * B)) if kind in LAYERS else ((B,), (1,), (4 * B,)):
        input = input_of(kind, *lead)
        with ran():
            actual = flat(traced(input))
        torch.testing.assert_close(actual, flat(ours(input)), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_lengths_are_not_traced():
    """A trace would hold their values, whatever it is called with."""

    class WithLengths(nn.Module):
        def __init__(self, given=None):
            super().__init__()
            self.rnn = build(modules, "GRU", 3, 4)
            self.given = given

        def forward(self, x, lengths):
            return self.rnn(x, lengths=self.given or lengths)[0]

    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    with pytest.raises(RuntimeError, match=r"torch.jit.trace would keep .* use torch.compile"):
        torch.jit.trace(WithLengths(), (x, lengths))
    constant = WithLengths([5, 2])
    traced = torch.jit.trace(constant, (x, lengths))
    torch.testing.assert_close(traced(-x, lengths), constant(-x, lengths))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_symbolic_trace_of_hooks_is_an_error(register):
    model = nn.Sequential(fusedrnn.LSTM(3, 4))
    getattr(model[0], register)(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"hooks twice: trace after fusedrnn.restore"):
        torch.fx.symbolic_trace(model)


@pytest.mark.parametrize("way", ["replace", "patched"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_symbolic_trace_has_them_as_one_node(kind, way):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = build(nn, kind, 3, 4, 1)
            self.cell = nn.GRUCell(4, 4)

        def forward(self, x, hx):
            output, final = self.rnn(x, hx)
            return self.cell(output[-1]), self.rnn(x)[0], final

    theirs = Tagger()
    if way == "patched":
        with fusedrnn.patched():
            ours = Tagger()
    else:
        ours = Tagger()
        assert len(fusedrnn.replace(ours).replaced) == 2
    expected = [(n.op, n.target) for n in torch.fx.symbolic_trace(theirs).graph.nodes]
    traced = torch.fx.symbolic_trace(ours)
    assert [(n.op, n.target) for n in traced.graph.nodes] == expected
    x, hx = torch.randn(5, 2, 3), states(kind, 1, 2, 4, dtype=torch.float32)
    with torch.no_grad():
        with ran("kernel_forward"):
            results = flat(traced(x, hx))
        assert all(map(torch.equal, results, flat(ours(x, hx))))


@pytest.mark.parametrize("kind", ["GRU", "RNN_tanh", "RNN_relu"])
def test_expanded_weights_take_torchs_way(kind):
    """They are tensors that do not say whether they require a gradient."""
    results = []
    for source in (nn, modules):
        layer = build(source, kind, 3, 4, 1, batch_first=True)
        call = call_for_per_sample_grads(layer, batch_size=5)
        call(torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0)))[0].sum().backward()
        results.append([p.grad_sample for p in layer.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantized kernels")
@ALL
def test_quantize_dynamic_leaves_them_alone(kind):
    _, ours = pair(kind, I, H)
    model = nn.ModuleDict({"rnn": ours, "head": nn.Linear(H, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, dtype=torch.qint8)
    assert type(quantized["rnn"]) is type(ours)
    assert type(quantized["head"]) is not nn.Linear
    input = input_of(kind, dtype=torch.float32)
    with ran("kernel_forward"):
        actual = flat(quantized["rnn"](input))
    assert all(map(torch.equal, actual, flat(ours(input))))


# What the kernels do not cover


@pytest.mark.parametrize("kind", [*LAYERS[:3], *CELLS[:3]])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex64(kind):
    theirs, ours = (module.to(torch.complex64) for module in pair(kind, I, H))
    input = input_of(kind, dtype=torch.complex64)
    with ran("torch"):
        actual = flat(ours(input))
        actual += torch.autograd.grad(actual[0].abs().sum(), list(ours.parameters()))
    exact = theirs.to(torch.complex128)
    expected = flat(exact(input.to(torch.complex128)))
    expected += torch.autograd.grad(expected[0].abs().sum(), list(exact.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_dtype=False)


class Doubled(torch.Tensor):
    """A tensor whose values are twice those of its memory, by __torch_dispatch__."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)

    def __init__(self, half):
        self.half_values = half

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return 2 * value.half_values if isinstance(value, Doubled) else value

        return function(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class Recorded(torch.Tensor):
    """A tensor that says what is done with it, by __torch_function__ on its own memory."""

    seen = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["input", "hx", "weight"])
@pytest.mark.parametrize("wrap", [Doubled, lambda t: t.as_subclass(Recorded)])
@pytest.mark.parametrize("grad", [True, False])
@ALL
def test_tensor_subclasses_are_computed_by_torch(kind, grad, wrap, where):
    results = []
    for module in pair(kind, I, H, dtype=torch.float64):
        input = input_of(kind)
        hx = states(kind, *((1, B) if kind in LAYERS else (B,)), H)
        if where == "input":
            input = wrap(input)
        elif where == "hx":
            hx = tuple(map(wrap, hx)) if isinstance(hx, tuple) else wrap(hx)
        else:
            weight = wrap(getattr(module, weight_of(kind)).detach())
            delattr(module, weight_of(kind))
            setattr(module, weight_of(kind), weight)
        Recorded.seen.clear()
        with torch.set_grad_enabled(grad):
            with ran("torch") if isinstance(module, modules._Fused) else ran():
                output = flat(module(input, hx))
            assert wrap is Doubled or any(kind[:3].lower() in name for name in Recorded.seen)
            if grad:
                leaves = [p for p in module.parameters() if type(p) is nn.Parameter]
                output += torch.autograd.grad(output[0].sum(), leaves)
        results.append([o.as_subclass(torch.Tensor).detach() for o in output])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*MaskedTensor", "ignore:.*prototype")
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to_sparse(),
        lambda t: t.to_mkldnn(),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        lambda t: torch.masked.masked_tensor(t, t > 0),
        lambda t: torch._neg_view(t),
        lambda t: torch.complex(t, t).conj().imag,
    ],
    ids=["sparse", "mkldnn", "quantized", "masked", "neg", "imag of conj"],
)
@ALL
def test_other_layouts_do_what_they_do_in_torch(kind, make):
    theirs, ours = pair(kind, I, H)
    input = make(input_of(kind, dtype=torch.float32))
    outcomes = []
    for module, computed in ((theirs, ()), (ours, ("torch",))):
        try:
            with torch.no_grad(), ran(*computed):
                outcomes.append(flat(module(input)))
        except Exception as error:
            outcomes.append(error)
    expected, actual = outcomes
    if isinstance(expected, list):
        torch.testing.assert_close(actual, expected)
    else:  # that of several dtypes is a RuntimeError that names them
        assert type(actual) is (RuntimeError if input.is_quantized else type(expected))


# Several processes


class Model(nn.Module):
    def __init__(self, namespace):
        super().__init__()
        self.lstm = namespace.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
        self.gru = namespace.GRU(2 * H, H, bias=False, dtype=torch.float64)
        self.cell = namespace.RNNCell(H, H, dtype=torch.float64)

    def forward(self, input):
        output, _ = self.lstm(input)
        output, h_n = self.gru(output)
        return output, self.cell(output[-1], h_n[0])


def two_steps(model, batch):
    """The parameters after two steps of SGD on `batch` [T, B, I]."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        output, last = model(batch)
        (output.square().mean() + last.square().mean()).backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def model_and_batch(namespace):
    torch.manual_seed(0)
    return Model(namespace), torch.randn(T, 4, I, dtype=torch.float64)


def one_of_two(rank, folder):
    """Trains with DDP, then with FSDP2, on half of the batch; leaves the weights in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}

    def train(name, model, batch):
        before = dict(ops.counts)
        weights = [w.detach().clone() for w in two_steps(model, batch[:, 2 * rank : 2 * rank + 2])]
        results[name] = weights, {n: count - before[n] for n, count in ops.counts.items()}

    model, batch = model_and_batch(fusedrnn)
    train("ddp", nn.parallel.DistributedDataParallel(model), batch)

    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
    model, batch = model_and_batch(fusedrnn)
    for module in (model.lstm, model.gru, model.cell, model):
        fully_shard(module, mesh=mesh)
    train("fsdp", model, batch)
    assert type(model.lstm.weight_hh_l0).__name__ == "DTensor"
    torch.save(results, f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained_in_two(tmp_path_factory):
    """What the two processes left: [{"ddp" or "fsdp": (weights, counts)}, ...]"""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("no gloo")
    folder = str(tmp_path_factory.mktemp("processes"))
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=one_of_two, args=(rank, folder), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(f"{folder}/{rank}") for rank in range(2)]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("namespace", [nn, fusedrnn])
def test_two_processes_train_as_one_does(trained_in_two, how, namespace):
    expected = two_steps(*model_and_batch(namespace))
    for results in trained_in_two:
        weights, counts = results[how]
        torch.testing.assert_close(weights, [w.detach() for w in expected], rtol=1e-10, atol=1e-10)
        # Two steps of four layers: two of LSTM, one of GRU and the cell.
        assert counts == {"kernel_forward": 8, "kernel_backward": 8, "reference": 0, "torch": 0}
