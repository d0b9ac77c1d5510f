"""What the layers have beyond torch.nn's: lengths, jagged nested tensors, reset masks and the cell
states of every step, each against torch.nn run sequence by sequence or step by step."""

import numpy
import pytest
import torch
from helpers import LAYERS, assert_same, build, flat, pair, ran, run, states
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from fusedrnn import modules

T, B, I, H = 6, 5, 3, 4  # noqa: E741
LENGTHS = [4, 0, 6, 1, 4]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"num_layers": 2, "batch_first": True},
]
ALL = pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in LAYERS for options in OPTIONS]
    + [("LSTM", {**options, "proj_size": 2}) for options in OPTIONS],
    ids=str,
)


def made(kind, options, dtype=torch.float64):
    """torch.nn's module, ours, an input and an hx."""
    theirs, ours = pair(kind, I, H, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    shape = (B, T, I) if options.get("batch_first") else (T, B, I)
    input = torch.randn(shape, generator=generator, dtype=dtype)
    first = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    hx = states(kind, first, B, H, dtype=dtype)
    if "proj_size" in options:
        hx = (hx[0][..., :2].contiguous(), hx[1])
    return theirs, ours, input, hx


class EachAlone(nn.Module):
    """lengths by torch.nn: each sequence of the batch by itself."""

    def __init__(self, module, lengths):
        super().__init__()
        self.module, self.lengths = module, lengths

    def forward(self, input, hx=None):
        if self.module.batch_first:
            input = input.transpose(0, 1)
        layers = self.module.num_layers * (1 + self.module.bidirectional)
        if hx is None:
            sizes = (self.module.proj_size or H, H)[: 2 if self.module.mode == "LSTM" else 1]
            hx = tuple(input.new_zeros(layers, B, size) for size in sizes)
        hx = flat(hx)
        outputs, finals = [], []
        for b, length in enumerate(self.lengths):
            state = [s[:, b : b + 1] for s in hx]
            width = (1 + self.module.bidirectional) * hx[0].shape[-1]
            output = input.new_zeros(T, 1, width)
            if length:
                x = input[:length, b : b + 1]
                x = x.transpose(0, 1) if self.module.batch_first else x
                given = tuple(state) if len(state) == 2 else state[0]
                y, state = self.module(x, given)
                y = y.transpose(0, 1) if self.module.batch_first else y
                output = torch.cat((y, output[length:]))
            outputs.append(output)
            finals.append(flat(state))
        output = torch.cat(outputs, 1)
        final = [torch.cat(s, 1) for s in zip(*finals, strict=True)]
        return output.transpose(0, 1) if self.module.batch_first else output, *final


class Keywords(nn.Module):
    """A module called with keywords."""

    def __init__(self, module, **keywords):
        super().__init__()
        self.module, self.keywords = module, keywords

    def forward(self, input, hx=None):
        return self.module(input, hx, **self.keywords)


@ALL
@pytest.mark.parametrize("as_tensor", [False, True])
def test_lengths(kind, options, as_tensor):
    theirs, ours, input, hx = made(kind, options)
    lengths = torch.tensor(LENGTHS) if as_tensor else LENGTHS
    for given in (None, hx):
        with ran("kernel_forward", "kernel_backward"):
            actual = run(Keywords(ours, lengths=lengths), input, given)
        assert_same(actual, run(EachAlone(theirs, LENGTHS), input, given))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_are_all_zero(kind, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    _, ours, input, hx = made(kind, options)
    input.requires_grad_()
    output, final = ours(input, hx, lengths=[0] * B, reset_mask=mask_of(*input.shape[:2]))
    assert output.shape == (*input.shape[:2], 2 * H)
    assert not output.any()
    assert all(map(torch.equal, flat(final), flat(hx)))
    (output.sum() + sum(s.sum() for s in flat(final))).backward()
    for t in (input, *ours.parameters()):  # as with a batch of none
        assert not t.grad.any()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_none_with_lengths(kind):
    _, ours, input, _ = made(kind, {})
    output, final = ours(input[:, :0], lengths=[])
    assert output.shape == (T, 0, H)
    assert flat(final)[0].shape == (1, 0, H)
    output.sum().backward()
    assert all(not p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_keywords_that_ask_for_nothing(kind):
    _, ours, input, hx = made(kind, {})
    nothing = {"lengths": None, "reset_mask": None, "reset_to_hx": False}
    nothing["return_cell_states"] = False
    assert all(map(torch.equal, flat(ours(input, hx, **nothing)), flat(ours(input, hx))))
    packed = pack_sequence([input[:, 0]])
    assert torch.equal(ours(packed, **nothing)[0].data, ours(packed)[0].data)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input, **nothing)[0], ours(input)[0])


def test_flags_are_taken_by_their_truth():
    _, ours, input, hx = made("LSTM", {})
    mask = mask_of(T, B)
    expected = flat(ours(input, hx, reset_mask=mask, reset_to_hx=True, return_cell_states=True))
    found = flat(ours(input, hx, reset_mask=mask, reset_to_hx=1, return_cell_states=numpy.True_))
    assert all(map(torch.equal, found, expected))
    found = flat(ours(input, hx, reset_mask=mask.numpy(), reset_to_hx=1, return_cell_states=1))
    assert all(map(torch.equal, found, expected))


def test_an_exported_program_has_none_of_them():
    module = build(modules, "LSTM", I, H)
    with pytest.raises(Exception, match="an exported program holds torch's own operation"):
        torch.export.export(module, (torch.randn(T, B, I),), {"lengths": LENGTHS})


@ALL
def test_jagged_nested_tensors(kind, options):
    """As a PackedSequence of the same sequences, gradients of all included."""
    _, ours, _, hx = made(kind, options)
    sequences = [torch.randn(n, I, dtype=torch.float64) for n in (2, 5, 1, 5, 3)]
    for given in (None, hx):
        found = []
        for jagged in (True, False):
            leaves = [s.clone().requires_grad_() for s in sequences]
            initial = [s.clone().requires_grad_() for s in flat(given)]
            state = None if given is None else tuple(initial) if len(initial) == 2 else initial[0]
            ours.zero_grad()
            if jagged:
                nested = torch.nested.as_nested_tensor(leaves, layout=torch.jagged)
                with ran("kernel_forward"):
                    output, final = ours(nested, state)
                assert output.layout is torch.jagged
                outputs = output.unbind()
            else:
                output, final = ours(pack_sequence(leaves, enforce_sorted=False), state)
                outputs = unpack_sequence(output)
            with ran("kernel_backward"):
                sum((t * t.cos()).sum() for t in (*outputs, *flat(final))).backward()
            tensors = [*leaves, *initial, *ours.parameters()]
            found.append([*outputs, *flat(final), *(t.grad for t in tensors)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class StepByStep(nn.Module):
    """reset_mask by torch.nn: one layer in steps, its state set anew between them."""

    def __init__(self, module, mask, to_hx):
        super().__init__()
        self.module, self.mask, self.to_hx = module, mask, to_hx

    def forward(self, input, hx):
        state = hx = flat(hx)
        outputs = []
        for t in range(T):
            cut = self.mask[t, :, None]
            anew = hx if self.to_hx else [torch.zeros_like(s) for s in hx]
            state = [torch.where(cut, a, s) for a, s in zip(anew, state, strict=True)]
            y, state = self.module(input[t : t + 1], tuple(state) if len(state) == 2 else state[0])
            state = flat(state)
            outputs.append(y)
        return torch.cat(outputs), *state


def mask_of(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.4


@pytest.mark.parametrize("to_hx", [False, True])
@pytest.mark.parametrize(("kind", "proj_size"), [*((k, 0) for k in LAYERS), ("LSTM", 2)])
def test_reset_mask(kind, proj_size, to_hx):
    theirs, ours, input, hx = made(kind, {"proj_size": 2} if proj_size else {})
    mask = mask_of(T, B)
    assert mask[0].any()
    with ran("kernel_forward", "kernel_backward"):
        actual = run(Keywords(ours, reset_mask=mask, reset_to_hx=to_hx), input, hx)
    assert_same(actual, run(StepByStep(theirs, mask, to_hx), input, hx))


@ALL
def test_reset_mask_is_a_boundary_for_both_directions(kind, options):
    """With one boundary for all, the two parts are two sequences; in each of the layers."""
    theirs, ours, input, _ = made(kind, options)
    mask = torch.zeros(T, B, dtype=torch.bool)
    mask[2] = True
    first = options.get("batch_first", False)
    time = 1 if first else 0
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    output, _ = ours(leaves[0], reset_mask=mask.t() if first else mask)
    parts = [theirs(part)[0] for part in leaves[1].split((2, T - 2), time)]
    expected = torch.cat(parts, time)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for module, result, leaf in ((ours, output, leaves[0]), (theirs, expected, leaves[1])):
        (result * result.cos()).sum().backward()
        module.gradients = [leaf.grad, *(p.grad for p in module.parameters())]
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_mask_with_lengths(kind):
    _, ours, input, hx = made(kind, {"num_layers": 2, "bidirectional": True})
    mask = mask_of(T, B)
    output, _ = ours(input, hx, lengths=LENGTHS, reset_mask=mask)
    for b, length in enumerate(LENGTHS):
        if length:
            x, m = input[:length, b : b + 1], mask[:length, b : b + 1]
            alone = tuple(s[:, b : b + 1] for s in flat(hx))
            y, _ = ours(x, alone if len(alone) == 2 else alone[0], reset_mask=m)
            torch.testing.assert_close(output[:length, b : b + 1], y, rtol=1e-10, atol=1e-10)


def test_reset_mask_of_an_unbatched_input():
    _, ours, input, _ = made("GRU", {})
    mask = mask_of(T, B)
    output, _ = ours(input[:, 0], reset_mask=mask[:, 0])
    torch.testing.assert_close(output, ours(input, reset_mask=mask)[0][:, 0])


class Cells(nn.Module):
    """return_cell_states by torch.nn: step by step, in both directions."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input, hx):
        size = self.module.proj_size or H
        output, final = self.module(input, hx)
        cells = []
        for d in range(1 + self.module.bidirectional):
            one = nn.LSTM(I, H, proj_size=self.module.proj_size, dtype=input.dtype)
            suffix = "_reverse" if d else ""
            weights = {n: getattr(self.module, n + suffix) for n, _ in one.named_parameters()}
            state, every = tuple(s[d : d + 1] for s in hx), []
            for t in range(T) if d == 0 else reversed(range(T)):
                y, state = torch.func.functional_call(one, weights, (input[t : t + 1], state))
                every.append(state[1])
            torch.testing.assert_close(y, output[t : t + 1, :, d * size : (d + 1) * size])
            cells.append(torch.cat(every if d == 0 else every[::-1]))
        return output, *final, torch.cat(cells, -1)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cell_states(bidirectional, proj_size):
    options = {"bidirectional": bidirectional, "proj_size": proj_size}
    theirs, ours, input, hx = made(
        "LSTM", options if proj_size else {"bidirectional": bidirectional}
    )
    with ran("kernel_forward", "kernel_backward"):
        actual = run(Keywords(ours, return_cell_states=True), input, hx)
    assert_same(actual, run(Cells(theirs), input, hx))


def test_cell_states_are_of_the_last_layer_and_as_the_input():
    _, ours, input, _ = made("LSTM", {"num_layers": 2, "batch_first": True})
    output, (_, c_n), cells = ours(input, return_cell_states=True)
    assert cells.shape == output.shape
    assert torch.equal(cells[:, -1], c_n[1])
    *_, unbatched = ours(input[0], return_cell_states=True)
    torch.testing.assert_close(unbatched, cells[0])
    *_, ragged = ours(input, lengths=LENGTHS, return_cell_states=True)
    torch.testing.assert_close(ragged[2], cells[2])
    assert not ragged[1].any()
    nested = torch.nested.nested_tensor([input[0, :3], input[1]], layout=torch.jagged)
    *_, jagged = ours(nested, return_cell_states=True)
    torch.testing.assert_close(jagged.unbind()[1], cells[1])
    with torch.no_grad():
        assert torch.equal(ours(input, return_cell_states=True)[2], cells)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_other_dtypes(kind, dtype):
    _, ours, input, hx = made(kind, {"num_layers": 2, "bidirectional": True}, dtype)
    mask = mask_of(T, B)
    with ran("kernel_forward"):
        output, _ = ours(input, hx, lengths=LENGTHS, reset_mask=mask)
    wide = [s.double() for s in flat(hx)]
    ours = ours.double()
    state = tuple(wide) if len(wide) == 2 else wide[0]
    expected, _ = ours(input.double(), state, lengths=LENGTHS, reset_mask=mask)
    assert output.dtype is dtype
    assert (output.double() - expected).abs().max() < 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", LAYERS)
def test_recompute_gates(kind):
    """The same bits, in fewer saved bytes; also packed, and in a compiled graph."""
    _, ours, input, hx = made(kind, {"num_layers": 2, "bidirectional": True}, torch.float32)
    packed = pack_sequence(list(input.transpose(0, 1)))

    def saved(module):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            module(input, hx)
        return max(t.numel() for t in kept)

    before, expected = saved(ours), run(ours, input, hx)
    of_packed = flat(ours(packed)[1])
    ours.recompute_gates = True
    share = {"LSTM": 2 / 5, "GRU": 1 / 4}.get(kind, 1)
    assert saved(ours) == share * before
    with ran("kernel_forward", "kernel_backward"):
        actual = run(ours, input, hx)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, flat(ours(packed)[1]), of_packed))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for a, b in zip(flat(compiled(input, hx)), flat(ours(input, hx)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast(kind, low):
    """The dtypes of a PackedSequence under autocast, and float32 arithmetic."""
    _, ours, input, hx = made(kind, {"num_layers": 2}, torch.float32)
    mask = mask_of(T, B)
    expected = flat(ours(input, hx, lengths=LENGTHS, reset_mask=mask))
    packed = pack_sequence([input[:n, b] for b, n in enumerate(LENGTHS) if n], False)
    with torch.autocast("cpu", low):
        with ran("kernel_forward"):
            results = flat(ours(input, hx, lengths=LENGTHS, reset_mask=mask))
        output, state = ours(packed)
    for a, b, like in zip(results, expected, [output.data, *flat(state)], strict=True):
        assert a.dtype is like.dtype
        torch.testing.assert_close(a.float(), b, rtol=0.01, atol=0.01)


def test_on_another_device():
    """meta stands for them all: lengths are on the CPU, and where the input is, rows are."""
    module = build(modules, "LSTM", I, H, device="meta")
    input = torch.empty(T, B, I, device="meta")
    output, (h_n, c_n), cells = module(input, lengths=LENGTHS, return_cell_states=True)
    for t, shape in ((output, (T, B, H)), (h_n, (1, B, H)), (c_n, (1, B, H)), (cells, (T, B, H))):
        assert t.device.type == "meta"
        assert t.shape == shape


def test_what_the_kernels_do_not_take_is_the_references():
    module = build(modules, "GRU", I, H, num_layers=2)
    input, mask = torch.randn(T, B, I), mask_of(T, B)
    expected, _ = module(input, lengths=LENGTHS, reset_mask=mask)
    with ran("reference"):
        output, _ = torch.func.functional_call(
            module,
            dict(module.named_parameters()),
            (input.as_subclass(Tagged),),
            {"lengths": LENGTHS, "reset_mask": mask},
        )
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-5)


class Tagged(torch.Tensor):
    pass


def test_under_compile():
    module = build(modules, "LSTM", I, H, num_layers=2)
    input, mask = torch.randn(T, B, I), mask_of(T, B)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return module(x, lengths=LENGTHS, reset_mask=mask, return_cell_states=True)

    expected = module(input, lengths=LENGTHS, reset_mask=mask, return_cell_states=True)
    actual = compiled(input)
    for a, b in zip(flat(actual), flat(expected), strict=True):
        torch.testing.assert_close(a, b)
    wanted = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(actual[2].sum(), wanted),
        torch.autograd.grad(expected[2].sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


WRONG_LENGTHS = {
    "too many": ([1] * (B + 1), ValueError, rf"lengths must be \[{B}\]"),
    "a number": (3, ValueError, "one for each sequence"),
    "too long": ([1, 2, 3, 4, T + 1], ValueError, f"from 0 to {T}"),
    "negative": ([1, 2, 3, 4, -1], ValueError, f"from 0 to {T}.*clamp"),
    "floats": ([1.0, 2, 3, 4, 5], TypeError, r"\.long\(\)"),
}


@pytest.mark.parametrize("case", WRONG_LENGTHS)
def test_wrong_lengths(case):
    lengths, error, message = WRONG_LENGTHS[case]
    module = build(modules, "GRU", I, H)
    with ran(), pytest.raises(error, match=message):
        module(torch.randn(T, B, I), lengths=lengths)


WRONG_MASKS = {
    "shape": (torch.zeros(B, T, dtype=torch.bool), r"\.t\(\)"),
    "dtype": (torch.zeros(T, B), r"\.bool\(\)"),
    "no tensor": ([[True]], r"\[1, 1\]"),
}


@pytest.mark.parametrize("case", WRONG_MASKS)
def test_wrong_masks(case):
    mask, message = WRONG_MASKS[case]
    module = build(modules, "LSTM", I, H)
    with (
        ran(),
        pytest.raises(ValueError, match=rf"must be torch.bool \[{T}, {B}\] on cpu.*{message}"),
    ):
        module(torch.randn(T, B, I), reset_mask=mask)


def test_other_keywords():
    x = torch.randn(T, B, I)
    for module, keywords in [
        (build(modules, "LSTM", I, H), {"length": [1] * B}),
        (build(modules, "GRU", I, H), {"return_cell_states": True}),
    ]:
        with ran(), pytest.raises(TypeError, match=next(iter(keywords))):
            module(x, **keywords)


def test_wrong_inputs():
    module = build(modules, "LSTM", I, H)
    x = torch.randn(T, B, I)
    packed = pack_sequence([x[:, 0]])
    jagged = torch.nested.nested_tensor([x[:, 0], x[:2, 0]], layout=torch.jagged)
    mask = mask_of(T, B)
    for error, message, arguments, keywords in [
        (ValueError, "pad it", (packed,), {"reset_mask": mask}),
        (ValueError, "pad it", (jagged,), {"lengths": [6, 2]}),
        (ValueError, "ragged in dimension 1", (jagged.transpose(1, 2),), {}),
        (ValueError, "unsqueeze", (x[:, 0],), {"lengths": [6]}),
        (RuntimeError, "Expected 3, got 4", (torch.randn(T, B, 4),), {"lengths": [1] * B}),
        (ValueError, "dtype", (x.double(),), {"lengths": [1] * B}),
        (RuntimeError, r"hidden\[0\] size \(1, 5, 4\)", (x, (x, x)), {"reset_mask": mask}),
        (RuntimeError, r"h_0, c_0", (x, x), {"reset_mask": mask}),
        (RuntimeError, "NoneType", (x, (None, None)), {"reset_mask": mask}),
        (
            RuntimeError,
            r"size \(1, 4\), got \[1, 1, 4\]",
            (x[:, 0], (torch.zeros(1, 1, H),) * 2),
            {"reset_mask": mask[:, 0]},
        ),
        (
            RuntimeError,
            "one dtype",
            (x, (torch.zeros(1, B, H), torch.zeros(1, B, H).double())),
            {"reset_mask": mask},
        ),
        (RuntimeError, "larger than 0", (x[:0],), {"lengths": [0] * B}),
        (ValueError, "on meta", (x,), {"reset_mask": mask.to("meta")}),
    ]:
        with ran(), pytest.raises(error, match=message):
            module(*arguments, **keywords)
