"""torch.func: every transform of a layer against the same transform of the reference, which is
plain torch operations, and who computed it: the kernels where they have a rule."""

import pytest
import torch
from helpers import LAYERS, build, flat, ran
from layers import LAYER_CELLS, layer_inputs
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import _pytree

from fusedrnn import functional, modules, ops

T, B, I, H, N = 3, 2, 2, 3, 4  # noqa: E741
FORWARD = ("kernel_forward",)
KERNELS = ("kernel_forward", "kernel_backward")
REFERENCE = ("reference",)


class Case:
    """A layer's inputs, and N of each; nothing requires grad."""

    def __init__(self, cell, directions):
        def tensors(*size, seed):
            x, initial, weights = layer_inputs(cell, *size, torch.float64, seed)
            return x.detach(), [s.detach() for s in initial], [w.detach() for w in weights]

        made = [tensors(T, B, I, H, directions, seed=seed) for seed in range(N)]
        self.x, self.initial, self.weights = made[0]
        self.xs = torch.stack([m[0] for m in made])
        self.initials = [torch.stack(s, 2) for s in zip(*(m[1] for m in made), strict=True)]
        self.stacks = [torch.stack(w) for w in zip(*(m[2] for m in made), strict=True)]

    def project(self):
        """Makes it an LSTM with a projection to 2 numbers."""
        self.initial[0], self.initials[0] = self.initial[0][..., :2], self.initials[0][..., :2]
        stacks = []
        for d in range(0, len(self.stacks), 4):
            weight_ih, weight_hh, *biases = self.stacks[d : d + 4]
            stacks += [weight_ih, weight_hh[..., :2], *biases, weight_hh[:, :2] * 0.5]
        self.stacks = stacks
        self.weights = [w[0] for w in stacks]


def loss(layer):
    return lambda w, x, i: sum(result.square().sum() for result in layer(x, i, w))


def autograd_of_vmap(layer, c):
    leaves = [c.xs.clone().requires_grad_(), *(w.clone().requires_grad_() for w in c.weights)]
    out = vmap(lambda x: layer(x, c.initial, leaves[1:]))(leaves[0])
    first = torch.autograd.grad(sum(o.square().sum() for o in out), leaves, create_graph=True)
    return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def autograd_of_samples(layer, c):
    leaves = [w.clone().requires_grad_() for w in c.weights]
    found = vmap(grad(lambda x: loss(layer)(leaves, x, c.initial)))(c.xs)
    return torch.autograd.grad(found.square().sum(), leaves)


def grad_of_vjp(layer, c):
    out, backward = vjp(lambda w: layer(c.x, c.initial, w)[0], c.weights)
    return grad(lambda g: sum(w.square().sum() for w in backward(g)[0]))(torch.ones_like(out))


def jvp_of_vjp(layer, c):
    out, backward = vjp(lambda w: layer(c.x, c.initial, w)[0], c.weights)
    return jvp(backward, (out.sin(),), (out.cos(),))


def tangents_of_everything(layer, c):
    primals = (c.x, c.initial, c.weights)
    return jvp(layer, primals, _pytree.tree_map(torch.cos, primals))


TRANSFORMS = {
    "vmap, input": (FORWARD, lambda f, c: vmap(lambda x: f(x, c.initial, c.weights))(c.xs)),
    "vmap, states": (FORWARD, lambda f, c: vmap(lambda i: f(c.x, i, c.weights), 2)(c.initials)),
    "vmap, weights": (FORWARD, lambda f, c: vmap(lambda w: f(c.x, c.initial, w))(c.stacks)),
    "vmap, input and weights": (
        FORWARD,
        lambda f, c: vmap(lambda x, w: f(x, (), w))(c.xs, c.stacks),
    ),
    "vmap of vmap": (
        FORWARD,
        lambda f, c: vmap(lambda x: vmap(lambda i: f(x, i, c.weights), 2)(c.initials))(c.xs),
    ),
    "vmap of vmap, weights": (
        FORWARD,
        lambda f, c: vmap(lambda w: vmap(lambda x: f(x, c.initial, w))(c.xs))(c.stacks),
    ),
    "vmap of a step": (
        FORWARD,
        lambda f, c: vmap(lambda x: f(x[0], [s[0] for s in c.initial], c.weights[:4]))(c.xs),
    ),
    "grad": (KERNELS, lambda f, c: grad(loss(f), (0, 1, 2))(c.weights, c.x, c.initial)),
    "grad of vmap": (
        KERNELS,
        lambda f, c: grad(lambda w: loss(vmap(f, (0, None, None)))(w, c.xs, c.initial))(c.weights),
    ),
    "vmap of grad": (
        KERNELS,
        lambda f, c: vmap(grad(loss(f), (0, 1, 2)), (None, 0, 2))(c.weights, c.xs, c.initials),
    ),
    "vmap of grad, weights alone": (
        KERNELS,
        lambda f, c: vmap(grad(loss(f)), (None, 0, None))(c.weights, c.xs, c.initial),
    ),
    "vmap of grad, ensemble": (
        KERNELS,
        lambda f, c: vmap(grad(loss(f), (0, 1, 2)), (0, 0, None))(c.stacks, c.xs, c.initial),
    ),
    "vmap of vmap of grad": (
        KERNELS,
        lambda f, c: vmap(
            lambda i: vmap(grad(loss(f), (0, 1, 2)), (None, 0, None))(c.weights, c.xs, i), 2
        )(c.initials),
    ),
    "vmap of grad, no batch": (
        KERNELS,
        lambda f, c: vmap(grad(lambda w, x: loss(f)(w, x, ())), (None, 0))(
            c.weights, c.xs[:, :, :0]
        ),
    ),
    "jacrev": (KERNELS, lambda f, c: jacrev(lambda w: f(c.x, c.initial, w)[0])(c.weights)),
    "vmap of jacrev": (
        KERNELS,
        lambda f, c: vmap(lambda x: jacrev(lambda w: f(x, c.initial, w)[0])(c.weights))(c.xs),
    ),
    "autograd of vmap, twice": ((*KERNELS, *REFERENCE), autograd_of_vmap),
    "autograd of vmap of grad": ((*KERNELS, *REFERENCE), autograd_of_samples),
    "grad of vjp": ((*KERNELS, *REFERENCE), grad_of_vjp),
    "grad of grad": (
        (*KERNELS, *REFERENCE),
        lambda f, c: grad(
            lambda x: sum(g.square().sum() for g in grad(loss(f))(c.weights, x, c.initial))
        )(c.x),
    ),
    "jacrev of jacrev": (
        (*KERNELS, *REFERENCE),
        lambda f, c: jacrev(jacrev(lambda x: loss(f)(c.weights, x, c.initial)))(c.x),
    ),
    "jvp of vjp": ((*FORWARD, *REFERENCE), jvp_of_vjp),
    "jvp": (REFERENCE, tangents_of_everything),
    "jvp of grad": (
        REFERENCE,
        lambda f, c: jvp(lambda x: grad(loss(f))(c.weights, x, c.initial), (c.x,), (c.x.cos(),)),
    ),
    "jacfwd": (REFERENCE, lambda f, c: jacfwd(lambda x: f(x, c.initial, c.weights)[0])(c.x)),
    "hessian": (
        REFERENCE,
        lambda f, c: (
            hessian(lambda w: loss(f)(w, c.x, c.initial))(c.weights[:4])
            if len(c.weights) == 4
            else hessian(lambda x: loss(f)(c.weights, x, c.initial))(c.x)
        ),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", LAYER_CELLS)
def test_transform(cell, directions, name):
    computed_by, transform = TRANSFORMS[name]
    if name == "vmap of a step" and directions == 2:
        pytest.skip("a step has one direction")
    c = Case(cell, directions)
    expected = transform(lambda *a: functional.reference_layer(cell, *a), c)
    with ran(*computed_by):
        actual = transform(lambda *a: functional.layer(cell, *a), c)
    leaves = _pytree.tree_leaves(actual)
    for a, b in zip(leaves, _pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert any(a.abs().sum() > 0 for a in leaves) or name.endswith("no batch")


MASK = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.bool)
EXTENDED = {
    "reset": ops.Options(reset=MASK, recompute=True),
    "reset to initial": ops.Options(reset=MASK, reset_to_initial=True),
    "packed": ops.Options(torch.tensor([2, 2, 1]), MASK.flatten()[:5], recompute=True),
}


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n != "vmap of a step"])
@pytest.mark.parametrize("given", EXTENDED)
@pytest.mark.parametrize(("cell", "projected"), [("lstm", True), ("lstm", False), ("gru", False)])
def test_transform_with_options(cell, projected, given, name):
    """As test_transform, with projections, and for an LSTM with the cells of every step."""
    if name.endswith("no batch"):
        pytest.skip("the mask has a batch")
    computed_by, transform = TRANSFORMS[name]
    c = Case(cell, 1 if name == "hessian" and not projected else 2)
    if projected:
        c.project()
    options = EXTENDED[given]._replace(cells=cell == "lstm")

    def layer(function):
        def call(x, initial, weights):
            if options.batch_sizes is not None:
                x = x.flatten(0, 1)[:5]
            return function(cell, x, initial, weights, options)

        return call

    expected = transform(layer(functional.reference_layer), c)
    with ran(*computed_by):
        actual = transform(layer(functional.layer), c)
    for a, b in zip(_pytree.tree_leaves(actual), _pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_vmap_over_masks(form):
    c = Case("lstm", 2)
    masks = torch.rand((N, T, B), generator=torch.Generator().manual_seed(2)) < 0.4
    batch_sizes = torch.tensor([2, 2, 1]) if form == "packed" else None

    def call(w, x, mask):
        if form == "packed":
            x, mask = x.flatten(0, 1)[:5], mask.flatten()[:5]
        options = ops.Options(batch_sizes, mask, cells=True)
        return sum(r.square().sum() for r in functional.layer("lstm", x, c.initial, w, options))

    with ran(*KERNELS):
        found = vmap(grad(call, (0, 1)), (None, None, 0))(c.weights, c.x, masks)
    for i in range(N):
        one = grad(call, (0, 1))(c.weights, c.x, masks[i])
        for a, b in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(one), strict=True):
            torch.testing.assert_close(a[i], b)


def test_finite_differences_of_what_a_transform_gives():
    c = Case("gru", 1)

    def of_samples(x, w):
        return vmap(lambda x: functional.layer("gru", x, c.initial, [w, *c.weights[1:]])[0])(x)

    leaves = (c.xs.clone().requires_grad_(), c.weights[0].clone().requires_grad_())
    assert torch.autograd.gradcheck(of_samples, leaves)
    assert torch.autograd.gradgradcheck(of_samples, leaves)


@pytest.mark.parametrize("kind", LAYERS)
def test_module_per_sample_gradients(kind):
    module = build(modules, kind, 3, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    inputs = torch.randn(5, 6, 2, 3, dtype=torch.float64)  # a sample has a batch of 2 here

    def loss(weights, x):
        return sum(r.square().sum() for r in flat(functional_call(module, weights, (x,))))

    with ran(*KERNELS):
        samples = vmap(grad(loss), (None, 0))(weights, inputs)
    for i, x in enumerate(inputs):
        found = torch.autograd.grad(
            sum(r.square().sum() for r in flat(module(x))), list(module.parameters())
        )
        for name, one in zip(weights, found, strict=True):
            torch.testing.assert_close(samples[name][i], one)


@pytest.mark.parametrize("cell", LAYER_CELLS)
@pytest.mark.parametrize("size", [(20, 12, 17, 33), (3, 9, 70, 130)], ids=str)
def test_per_sample_gradients_of_the_kernel(cell, size):
    x, initial, weights = layer_inputs(cell, *size, 2, torch.float32)
    inputs = [t.detach() for t in (x, *initial, *weights)]
    x, initial, weights = inputs[0], inputs[1 : len(initial) + 1], inputs[len(initial) + 1 :]
    results, saved = ops.forward(cell, x, initial, weights, True)
    grads = tuple(torch.randn_like(r) for r in results)
    arguments = (cell, x, initial, weights, saved, grads, (True,) * len(inputs))
    whole = ops.backward(*arguments)
    threads = torch.get_num_threads()
    for groups in (3, size[1]):
        samples = ops.backward(*arguments, groups=groups)
        for a, b in zip(samples, whole, strict=True):
            assert a.shape == b.shape or a.shape == (groups, *b.shape)
            total = a if a.shape == b.shape else a.sum(0)
            torch.testing.assert_close(total, b, rtol=1e-4, atol=2e-5 * b.abs().max().item())
        try:
            torch.set_num_threads(1 if threads > 1 else 2)
            for a, b in zip(ops.backward(*arguments, groups=groups), samples, strict=True):
                assert torch.equal(a, b)
        finally:
            torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="groups must divide a batch"):
        ops.backward(*arguments, groups=5)


@pytest.mark.parametrize("kind", LAYERS)
def test_module_ensemble(kind):
    ensemble = [build(modules, kind, 3, 4, seed=seed, batch_first=True) for seed in range(3)]
    weights, buffers = stack_module_state(ensemble)
    x = torch.randn(2, 5, 3)
    with ran(*FORWARD):
        together = vmap(lambda w, b: flat(functional_call(ensemble[0], (w, b), (x,))))(
            weights, buffers
        )
    for i, module in enumerate(ensemble):
        for a, b in zip(together, flat(module(x)), strict=True):
            torch.testing.assert_close(a[i], b)


def test_dropout_under_vmap():
    module = build(modules, "LSTM", 3, 8, num_layers=2, dropout=0.5)
    x = torch.randn(5, 1, 3).expand(4, 5, 1, 3)
    different = vmap(lambda x: module(x)[0], randomness="different")(x)
    same = vmap(lambda x: module(x)[0], randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_module_in_forward_mode(kind):
    module = build(modules, kind, 3, 4, num_layers=2, dtype=torch.float64)
    x, tangent = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        difference = (module(x + step * tangent)[0] - module(x - step * tangent)[0]) / (2 * step)
    with forward_ad.dual_level(), ran(*REFERENCE):
        dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))[0]).tangent
    torch.testing.assert_close(dual, difference, rtol=1e-6, atol=1e-7)
    with ran(*REFERENCE):
        torch.testing.assert_close(jvp(lambda x: module(x)[0], (x,), (tangent,))[1], dual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(dtype):
    module = build(modules, "GRU", 3, 4, dtype=dtype)
    x = torch.randn(4, 5, 2, 3).to(dtype)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, x):
        return functional_call(module, weights, (x,))[0].abs().square().sum()

    with ran(*(REFERENCE if dtype.is_complex else KERNELS)):
        samples = vmap(grad(loss), (None, 0))(weights, x)
    for i in range(4):
        found = torch.autograd.grad(module(x[i])[0].abs().square().sum(), list(module.parameters()))
        for name, one in zip(weights, found, strict=True):
            torch.testing.assert_close(samples[name][i], one, rtol=0.05, atol=0.05)


def test_a_wrong_shape_is_an_error():
    module = build(modules, "LSTM", 3, 4)
    with pytest.raises(RuntimeError):
        vmap(module)(torch.randn(4, 5, 2, 7))
    weights = [torch.randn(12, 3), torch.randn(12, 4), None, None]
    with pytest.raises(RuntimeError, match="h0 must be"):
        vmap(lambda x: functional.layer("gru", x, [x.new_zeros(1, 9, 4)], weights))(
            torch.randn(4, 5, 2, 3)
        )
