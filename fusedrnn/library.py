"""The layers as custom operators of torch, for torch.compile, and their rules under torch.func.

Eager calls do not pass here: functional.py serves them at a lower cost. No math either: what an
operator computes is ops.py's, or reference.py's where the kernels do not take the tensors.

For each cell two operators, `tensors` being input [T, B, I], h0 (and c0) [D, B, H] or None, and
eight weights as in functional.py, the last four None without a second direction:

    fusedrnn::lstm_forward(save, *tensors) -> (output, h_n, c_n, saved)
    fusedrnn::lstm_backward(groups, needed, *tensors, saved, grad_output, grad_h_n, grad_c_n)
        -> the gradients of those of `tensors` that are `needed`

With groups = N > 0, N samples lie side by side in the batch, [T, N * B, I], and the gradients of
the weights are each sample's own, [N, ...]. So a vmap over either operator is again one call of it,
unless the weights differ from sample to sample; then it is one call a sample.

`saved`, what the backward needs, is empty without `save`. Autograd asks for it below the operator
that it records, so that a caller never does. Forward-mode AD and second derivatives are composed of
torch's operations, from reference.py: a missing rule would be a zero derivative, and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import library as custom_operators
from torch._C import _is_any_autocast_enabled
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.compiler import is_exporting
from torch.nn import Parameter

from fusedrnn import ops, reference

_Optional = Sequence[Tensor | None]
_AUTOGRAD_KEYS = [k for n, k in torch._C.DispatchKey.__members__.items() if "Autograd" in n]
_WEIGHTS = 8  # for two directions


def has(weights: ops.Weights, options: ops.Options | None) -> bool:
    """Whether there are operators for such a layer: not for projections, nor with options."""
    return options is None and ops.weights_per_direction(weights) == 4


def fits_a_graph(tensors: Sequence[Any]) -> bool:
    """Whether `layer` takes these tensors, asked while torch.compile builds a graph.

    torch.export asks too; its tensors are of a class of its own.
    """
    first = tensors[0]
    if _is_any_autocast_enabled() or forward_ad._current_level >= 0:
        return False
    return all(
        (isinstance(t, Tensor) if is_exporting() else type(t) in (Tensor, Parameter))
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and t.dtype in ops.DTYPES
        and t.dtype == first.dtype
        for t in tensors
    )


def layer(
    cell: str, input: Tensor, initial: ops.Tensors, weights: ops.Weights
) -> tuple[Tensor, ...]:
    """functional.layer by the operators; the shapes must be those of a layer, or of one step."""
    if input.dim() == 2:
        results = layer(cell, input[None], [s[None] for s in initial], weights)
        return tuple(r.squeeze(0) for r in results[1:])
    states = tuple(initial) or (None,) * ops.CELLS[cell].states
    rest = (None,) * (_WEIGHTS - len(weights))
    return _FORWARD[cell](False, input, *states, *weights, *rest)[:-1]  # type: ignore[no-any-return]


def _unpack(
    cell: str, tensors: _Optional
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(input, initial, weights) as ops.py takes them."""
    input, states = tensors[0], 1 + ops.CELLS[cell].states
    assert input is not None
    count = 4 if tensors[states + 4] is None else _WEIGHTS
    initial = tuple(t for t in tensors[1:states] if t is not None)
    return input, initial, tuple(tensors[states : states + count])


def _results_of_reference(cell: str, tensors: _Optional) -> tuple[Tensor, ...]:
    ops.count("reference")
    input, initial, weights = _unpack(cell, tensors)
    return reference.scan(cell, input, initial, weights)


def _gradients_of_reference(
    cell: str, groups: int, needed: Sequence[bool], tensors: _Optional, grads: _Optional
) -> tuple[Tensor, ...]:
    """What the backward operator returns, in operations that have every rule of torch's."""
    if groups:
        return _by_group(_gradients_of_reference, cell, groups, needed, tensors, grads)
    wanted = [i for i, n in enumerate(needed) if n]

    def results(*chosen: Tensor) -> tuple[Tensor, ...]:
        replaced = list(tensors)
        for i, t in zip(wanted, chosen, strict=True):
            replaced[i] = t
        return _results_of_reference(cell, replaced)

    primal, vjp = torch.func.vjp(results, *[tensors[i] for i in wanted])  # type: ignore[misc]
    full = (torch.zeros_like(p) if g is None else g for p, g in zip(primal, grads, strict=True))
    return vjp(tuple(full))  # type: ignore[no-any-return]


def _by_group(
    gradients: Callable[..., tuple[Tensor, ...]],
    cell: str,
    groups: int,
    needed: Sequence[bool],
    tensors: _Optional,
    grads: _Optional,
) -> tuple[Tensor, ...]:
    """gradients(cell, groups, ...) from a call without groups for each sample."""
    states = 1 + ops.CELLS[cell].states

    def split(batched: _Optional) -> list[tuple[Tensor | None, ...]]:
        chunks = [(None,) * groups if t is None else t.chunk(groups, 1) for t in batched]
        return list(zip(*chunks, strict=True))

    each = [
        gradients(cell, 0, needed, (*of_input, *tensors[states:]), of_grads)
        for of_input, of_grads in zip(split(tensors[:states]), split(grads), strict=True)
    ]
    batched = sum(needed[:states])
    return tuple(
        torch.cat(g, 1) if i < batched else torch.stack(g)
        for i, g in enumerate(zip(*each, strict=True))
    )


# What the operators do, once no transform is left ------------------------------------------------


def _forward(cell: str, save: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    input, initial, weights = _unpack(cell, tensors)
    result = ops.forward(cell, input, initial, weights, save)
    if result is not None:
        results, saved = result
        return *results, input.new_empty(0) if saved is None else saved
    ops.check_layer(cell, input, initial, weights)
    results = _results_of_reference(cell, tensors)
    fresh = [r.clone(memory_format=torch.contiguous_format) for r in results]
    return *fresh, _saved_like(cell, save, input, weights).zero_()


def _saved_like(cell: str, save: bool, input: Tensor, weights: ops.Weights) -> Tensor:
    """A tensor of the shape and dtype of what ops.forward saves."""
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if narrow and save else input.dtype
    return input.new_empty(sum(_parts(cell, input, weights)) if save else 0, dtype=dtype)


def _parts(cell: str, input: Tensor, weights: ops.Weights) -> tuple[int, ...]:
    """How many numbers ops.forward saves: gates [D, T, B, G*H], then [D, T, B, H] for some."""
    assert weights[1] is not None
    each = len(weights) // 4 * input.shape[0] * input.shape[1] * weights[1].shape[1]
    return each * ops.CELLS[cell].gates, each * ops.CELLS[cell].extra


def _fake_forward(cell: str, save: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    input, initial, weights = _unpack(cell, tensors)
    ops.check_layer(cell, input, initial, weights)
    assert weights[1] is not None
    directions, hidden = len(weights) // 4, weights[1].shape[1]
    seq_len, batch, _ = input.shape
    output = input.new_empty(seq_len, batch, directions * hidden)
    final = (input.new_empty(directions, batch, hidden) for _ in range(ops.CELLS[cell].states))
    return output, *final, _saved_like(cell, save, input, weights)


def _backward(
    cell: str, groups: int, needed: Sequence[bool], *arguments: Tensor | None
) -> tuple[Tensor, ...]:
    tensors, saved, grads = _split(cell, arguments)
    input, initial, weights = _unpack(cell, tensors)
    if ops.takes(cell, input, initial, weights):
        flags = (*needed[: 1 + len(initial)], *needed[-_WEIGHTS:][: len(weights)])
        found = ops.backward(
            cell, input, initial, weights, saved, tuple(grads), flags, groups=groups
        )
        if found is not None:
            return tuple(f for f in found if f is not None)
    return _plain_gradients(cell, groups, needed, tensors, grads)


def _plain_gradients(
    cell: str, groups: int, needed: Sequence[bool], tensors: _Optional, grads: _Optional
) -> tuple[Tensor, ...]:
    """The backward of what the kernels do not take, inside the operator: nobody is watching."""
    if groups:
        return _by_group(_plain_gradients, cell, groups, needed, tensors, grads)
    # Inside an operator's kernel autograd is switched off.
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        leaves = [
            t if t is None else t.detach().requires_grad_(n)
            for t, n in zip(tensors, needed, strict=True)
        ]
        results = _results_of_reference(cell, leaves)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            [t for t, n in zip(leaves, needed, strict=True) if n and t is not None],
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return tuple(f.clone(memory_format=torch.contiguous_format) for f in found)


def _split(cell: str, arguments: _Optional) -> tuple[_Optional, Tensor, _Optional]:
    """(tensors, saved, grads) of the backward operator's arguments."""
    count = 1 + ops.CELLS[cell].states + _WEIGHTS
    saved = arguments[count]
    assert saved is not None
    return arguments[:count], saved, arguments[count + 1 :]


def _fake_backward(
    cell: str, groups: int, needed: Sequence[bool], *arguments: Tensor | None
) -> list[Tensor]:
    tensors, _, _ = _split(cell, arguments)
    states = 1 + ops.CELLS[cell].states
    return [
        t.new_empty((groups, *t.shape) if groups and i >= states else t.shape)
        for i, (t, n) in enumerate(zip(tensors, needed, strict=True))
        if n and t is not None
    ]


# vmap --------------------------------------------------------------------------------------------


def _fold(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The vmapped dimension as part of the batch, which is dimension 1 of all but weights."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(1).expand(tensor.shape[0], size, *tensor.shape[1:])
    else:
        tensor = tensor.movedim(dim, 1)
    return tensor.flatten(1, 2)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    """The vmapped dimension as dimension 1 again."""
    batch = tensor.shape[1] // size
    return tensor.reshape(tensor.shape[0], size, batch, *tensor.shape[2:])


def _one_by_one(
    function: Callable[..., Any], size: int, in_dims: Sequence[int | None], tensors: _Optional
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule where weights differ: function(*tensors) for each sample, results stacked."""
    each = [
        function(
            *(
                t if t is None or d is None else t.select(d, i)
                for t, d in zip(tensors, in_dims, strict=True)
            )
        )
        for i in range(size)
    ]
    results = tuple(torch.stack(r) for r in zip(*each, strict=True))
    return results, (0,) * len(results)


def _weights_differ(cell: str, in_dims: Sequence[int | None]) -> bool:
    states = 1 + ops.CELLS[cell].states
    return any(d is not None for d in in_dims[states : states + _WEIGHTS])


def _vmap_forward(
    apply: Callable[..., Any],
    cell: str,
    size: int,
    in_dims: Sequence[int | None],
    save: bool,
    *tensors: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    in_dims = in_dims[1:]
    if _weights_differ(cell, in_dims):
        return _one_by_one(partial(apply, save), size, in_dims, tensors)
    states = 1 + ops.CELLS[cell].states
    inputs = [_fold(t, d, size) for t, d in zip(tensors[:states], in_dims, strict=False)]
    *results, saved = apply(save, *inputs, *tensors[states:])
    dims: list[int | None] = [1] * len(results)
    if not save:
        return (*(_unfold(r, size) for r in results), saved), (*dims, None)
    input, _, weights = _unpack(cell, (*inputs, *tensors[states:]))
    rows = len(weights) // 4 * input.shape[0]  # D * T
    parts = torch.split(saved, list(_parts(cell, input, weights)))
    saved = torch.cat([p.reshape(rows, size, -1).transpose(0, 1).flatten(1) for p in parts], 1)
    return (*(_unfold(r, size) for r in results), saved), (*dims, 0)


def _vmap_backward(
    apply: Callable[..., Any],
    cell: str,
    size: int,
    in_dims: Sequence[int | None],
    groups: int,
    needed: Sequence[bool],
    *arguments: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    in_dims = in_dims[2:]
    if _weights_differ(cell, in_dims):
        return _one_by_one(partial(apply, groups, needed), size, in_dims, arguments)
    tensors, saved, _ = _split(cell, arguments)
    states, count = 1 + ops.CELLS[cell].states, len(tensors)
    folded = [
        t if states <= i < count else _fold(t, d, size)
        for i, (t, d) in enumerate(zip(arguments, in_dims, strict=True))
        if i != count
    ]
    input, _, weights = _unpack(cell, folded)
    rows = len(weights) // 4 * input.shape[0]  # D * T
    dim = in_dims[count]
    saved = saved.expand(size, -1) if dim is None else saved.movedim(dim, 0)
    one = [p // size for p in _parts(cell, input, weights)]
    parts = [p.reshape(size, rows, -1) for p in torch.split(saved, one, 1)]
    folded.insert(count, torch.cat([p.transpose(0, 1).flatten() for p in parts]))
    found = apply(max(groups, 1) * size, needed, *folded)
    results, dims = [], []
    for i, result in zip((i for i in range(count) if needed[i]), found, strict=True):
        if i < states:
            results.append(_unfold(result, size))
        else:
            results.append(result.unflatten(0, (size, groups)) if groups else result)
        dims.append(1 if i < states else 0)
    return tuple(results), tuple(dims)


# autograd ----------------------------------------------------------------------------------------


class _Forward(Function):
    """apply(cell, redispatch, save, *tensors): records the forward operator."""

    @staticmethod
    def forward(ctx: Any, cell: str, redispatch: Any, save: bool, *tensors: Tensor | None) -> Any:
        *results, saved = redispatch(True, *tensors)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        if not save:
            saved = saved.new_empty(0)
        ctx.mark_non_differentiable(saved)
        return *results, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        needed = [n and t is not None for n, t in zip(needs, tensors, strict=True)]
        found: Any = ()
        if all(g is None for g in grads[:-1]):
            needed = [False] * len(tensors)
        elif forward_ad._current_level >= 0:
            found = _gradients_of_reference(ctx.cell, 0, needed, tensors, grads[:-1])
        elif any(needed):
            found = _BACKWARD[ctx.cell](0, needed, *tensors, saved, *grads[:-1])
        gradients = iter(found)
        return None, None, None, *(next(gradients) if n else None for n in needed)


class _Backward(Function):
    """apply(cell, redispatch, groups, needed, *arguments): records the backward operator."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        redispatch: Any,
        groups: int,
        needed: Sequence[bool],
        *arguments: Tensor | None,
    ) -> Any:
        ctx.cell, ctx.groups, ctx.needed = cell, groups, needed
        ctx.save_for_backward(*arguments)
        return tuple(redispatch(groups, needed, *arguments))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        arguments = ctx.saved_tensors
        count = len(_split(ctx.cell, arguments)[0])  # where `saved` is, which has no gradient
        needs = ctx.needs_input_grad[4:]
        wanted = [
            i
            for i, (t, n) in enumerate(zip(arguments, needs, strict=True))
            if n and t is not None and i != count
        ]

        def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
            replaced = list(arguments)
            for i, t in zip(wanted, chosen, strict=True):
                replaced[i] = t
            tensors, _, grads = _split(ctx.cell, replaced)
            return _gradients_of_reference(ctx.cell, ctx.groups, ctx.needed, tensors, grads)

        vjp = torch.func.vjp(gradients, *(arguments[i] for i in wanted))[1]
        found = dict(zip(wanted, vjp(cotangents), strict=True))
        return None, None, None, None, *(found.get(i) for i in range(len(arguments)))


def _autograd_kernel(
    cell: str,
    operator: Any,
    function: type[Function],
    composed: Callable[..., Any],
    keyset: Any,
    *arguments: Any,
) -> Any:
    """What the dispatcher calls for autograd, at every level of torch.func's that has any."""
    if forward_ad._current_level >= 0:
        return composed(cell, *arguments)

    def redispatch(*arguments: Any) -> Any:
        # Grad mode is of the levels below, and autograd switches it off inside a Function.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
    with enable_single_level_autograd_function():
        # Function.apply itself would begin with torch.func's levels, of which this is one.
        return super(Function, function).apply(cell, redispatch, *arguments)  # type: ignore[misc]


def _forward_composed(cell: str, save: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    input, _, weights = _unpack(cell, tensors)
    saved = _saved_like(cell, save, input, weights).zero_()
    return *_results_of_reference(cell, tensors), saved


def _backward_composed(*arguments: Any) -> Any:
    raise NotImplementedError("fusedrnn's backward operators have no forward-mode derivative")


# The operators -----------------------------------------------------------------------------------

_LIBRARY: Any = custom_operators.Library("fusedrnn", "DEF")  # type: ignore[no-untyped-call]


def _define(cell: str) -> tuple[Any, Any]:
    """(forward, backward) operator of a cell."""
    states = ("h0", "c0")[: ops.CELLS[cell].states]
    names = [
        f"{name}{direction}"
        for direction in ("", "_reverse")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]
    optional = [f"Tensor? {name}" for name in (*states, *names)]
    tensors = ", ".join(["Tensor input", *optional])
    for name in names[:2]:
        tensors = tensors.replace(f"Tensor? {name},", f"Tensor {name},")
    results = ", ".join(["Tensor"] * (2 + len(states)))
    grads = ", ".join(
        f"Tensor? grad_{name}" for name in ("output", "h_n", "c_n")[: 1 + len(states)]
    )
    forward, backward = f"{cell}_forward", f"{cell}_backward"
    schemas = {
        forward: f"(bool save, {tensors}) -> ({results})",
        backward: f"(int groups, bool[] needed, {tensors}, Tensor saved, {grads}) -> Tensor[]",
    }
    for name, schema in schemas.items():
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    operators = [getattr(torch.ops.fusedrnn, name).default for name in schemas]

    def register(
        name: str,
        operator: Any,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        vmap: Callable[..., Any],
        autograd: Callable[..., Any],
    ) -> None:
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
        custom_operators.register_fake(f"fusedrnn::{name}", fake, lib=_LIBRARY)

        def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return vmap(operator, cell, info.batch_size, in_dims, *arguments)

        custom_operators.register_vmap(f"fusedrnn::{name}", rule, lib=_LIBRARY)

    register(
        forward,
        operators[0],
        partial(_forward, cell),
        partial(_fake_forward, cell),
        _vmap_forward,
        partial(_autograd_kernel, cell, operators[0], _Forward, _forward_composed),
    )
    register(
        backward,
        operators[1],
        lambda *arguments: list(_backward(cell, *arguments)),
        partial(_fake_backward, cell),
        _vmap_backward,
        lambda keyset, *arguments: list(
            _autograd_kernel(cell, operators[1], _Backward, _backward_composed, keyset, *arguments)
        ),
    )
    return operators[0], operators[1]


_OPERATORS = {cell: _define(cell) for cell in ops.CELLS}
_FORWARD = {cell: forward for cell, (forward, _) in _OPERATORS.items()}
_BACKWARD = {cell: backward for cell, (_, backward) in _OPERATORS.items()}
