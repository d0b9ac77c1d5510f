"""The layers as custom operators of torch, for torch.compile, and their rules under torch.func.

Eager calls do not pass here: functional.py serves them at a lower cost. No math either: what an
operator computes is ops.py's, or reference.py's where the kernels do not take the tensors.

For each cell two operators:

    fusedrnn::lstm_forward(save, flags, *tensors) -> the results of functional.layer, and `saved`
    fusedrnn::lstm_backward(groups, needed, flags, *tensors, saved, *grads)
        -> the gradients of those of `tensors` that are `needed`

tensors: input [T, B, I], or [N, I] with batch_sizes; h0 (and c0) or None; ten weights, weight_ih,
    weight_hh, bias_ih, bias_hh and weight_hr of each direction, None where there is none;
    batch_sizes and reset of ops.Options
flags: reset_to_initial, cells, recompute and bf16 of ops.Options
grads: of output, h_n (c_n and cells), None for zero

With groups = N > 0, N samples lie side by side in the batch, [T, N * B, I], and the gradients of
the weights are each sample's own, [N, ...]. So a vmap over either operator is again one call of it,
unless there are batch_sizes, or weights that differ from sample to sample; then it is one call a
sample.

`saved`, what the backward needs, is there with `save`. Autograd asks for it below the operator
that it records, so that a caller never does. Forward-mode AD and second derivatives are composed of
torch's operations, from reference.py: a missing rule would be a zero derivative, and no error.

    fusedrnn::ragged(lengths, first, stride, seq_len) -> (rows, batch_sizes, order)

is extensions.py's Ragged of a padded or jagged input. How large its results are is known at run
time only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch import library as custom_operators
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import TracingContext
from torch.autograd import Function, forward_ad
from torch.compiler import is_exporting
from torch.nn import Parameter

from fusedrnn import extensions, ops, reference

_Optional = Sequence[Tensor | None]
_AUTOGRAD_KEYS = [k for n, k in torch._C.DispatchKey.__members__.items() if "Autograd" in n]
_PER_DIRECTION = 5  # weights
_WEIGHTS = 2 * _PER_DIRECTION


def fits_a_graph(tensors: Sequence[Any]) -> bool:
    """Whether these are tensors that `layer` may take, asked while torch.compile builds a graph.

    torch.export asks too; its tensors are of a class of its own.
    """
    return forward_ad._current_level < 0 and all(
        (isinstance(t, Tensor) if is_exporting() else type(t) in (Tensor, Parameter))
        and t.device.type == "cpu"
        and t.layout is torch.strided
        for t in tensors
    )


def sizes_may_be_unknown() -> bool:
    """Whether the graph may have sizes that are known at run time only: with fullgraph=True."""
    context: Any = TracingContext.try_get()
    sizes = context and context.fake_mode and context.fake_mode.shape_env
    return bool(sizes and sizes.allow_scalar_outputs and sizes.allow_dynamic_output_shape_ops)


# As torch.compiler.assume_constant_result does, which imports all of Dynamo: `import fusedrnn` took
# a second more, nearly twice as long as `import torch`.
sizes_may_be_unknown._dynamo_marked_constant = True  # type: ignore[attr-defined]


def layer(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
) -> tuple[Tensor, ...]:
    """functional.layer by the operators; the shapes must be those of a layer, or of one step."""
    batch_sizes, reset, *flags = options or ops.Options()
    if input.dim() == 2 and batch_sizes is None:
        results = layer(cell, input[None], [s[None] for s in initial], weights)
        return tuple(r.squeeze(0) for r in results[1:])
    states = tuple(initial) or (None,) * ops.CELLS[cell].states
    per_direction = ops.weights_per_direction(weights)
    padded: list[Tensor | None] = []
    for i in range(0, len(weights), per_direction):
        padded += [*weights[i : i + per_direction], None][:_PER_DIRECTION]
    padded += [None] * (_WEIGHTS - len(padded))
    flags = [bool(f) for f in flags]
    return tuple(_FORWARD[cell](False, flags, input, *states, *padded, batch_sizes, reset))


def _present(cell: str, tensors: _Optional) -> tuple[list[int], list[int]]:
    """Where among `tensors` are the initial states, and the weights, that ops.py takes."""
    first = 1 + ops.CELLS[cell].states
    per_direction = 4 if tensors[first + 4] is None else 5
    starts = [first] if tensors[first + _PER_DIRECTION] is None else [first, first + _PER_DIRECTION]
    return (
        [i for i in range(1, first) if tensors[i] is not None],
        [start + k for start in starts for k in range(per_direction)],
    )


def _unpack(
    cell: str, flags: Sequence[bool], tensors: Sequence[Any]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], ops.Options]:
    """(input, initial, weights, options) as ops.py takes them."""
    states, weights = _present(cell, tensors)
    input, initial = tensors[0], tuple(tensors[i] for i in states)
    options = ops.Options(tensors[-2], tensors[-1], *flags)
    return input, initial, tuple(tensors[i] for i in weights), options


def _results_of_reference(
    cell: str, flags: Sequence[bool], tensors: _Optional
) -> tuple[Tensor, ...]:
    ops.count("reference")
    input, initial, weights, options = _unpack(cell, flags, tensors)
    with torch.autocast("cpu", enabled=False):  # the tensors are as it wants them
        return reference.scan(cell, input, initial, weights, *options[:4])


def _gradients_of_reference(
    cell: str,
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    tensors: _Optional,
    grads: _Optional,
) -> tuple[Tensor, ...]:
    """What the backward operator returns, in operations that have every rule of torch's."""
    if groups:
        return _by_group(_gradients_of_reference, cell, groups, needed, flags, tensors, grads)
    wanted = [i for i, n in enumerate(needed) if n]

    def results(*chosen: Tensor) -> tuple[Tensor, ...]:
        replaced = list(tensors)
        for i, t in zip(wanted, chosen, strict=True):
            replaced[i] = t
        return _results_of_reference(cell, flags, replaced)

    with torch.autocast("cpu", enabled=False):
        primal, vjp = torch.func.vjp(results, *[tensors[i] for i in wanted])  # type: ignore[misc]
        full = (torch.zeros_like(p) if g is None else g for p, g in zip(primal, grads, strict=True))
        return vjp(tuple(full))  # type: ignore[no-any-return]


def _by_group(
    gradients: Callable[..., tuple[Tensor, ...]],
    cell: str,
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    tensors: _Optional,
    grads: _Optional,
) -> tuple[Tensor, ...]:
    """gradients(cell, groups, ...) from a call without groups for each sample."""
    states = 1 + ops.CELLS[cell].states

    def split(batched: _Optional) -> list[tuple[Tensor | None, ...]]:
        chunks = [(None,) * groups if t is None else t.chunk(groups, 1) for t in batched]
        return list(zip(*chunks, strict=True))

    *inputs, reset = (*tensors[:states], tensors[-1])
    each = [
        gradients(cell, 0, needed, flags, (*of_input, *tensors[states:-1], of_reset), of_grads)
        for (*of_input, of_reset), of_grads in zip(
            split((*inputs, reset)), split(grads), strict=True
        )
    ]
    batched = sum(needed[:states])
    return tuple(
        torch.cat(g, 1) if i < batched else torch.stack(g)
        for i, g in enumerate(zip(*each, strict=True))
    )


# What the operators do, once no transform is left ------------------------------------------------


def _forward(cell: str, save: bool, flags: Sequence[bool], *tensors: Tensor | None) -> list[Tensor]:
    input, initial, weights, options = _unpack(cell, flags, tensors)
    if _without_rows(input, initial, options):
        return _fake_forward(cell, save, flags, *tensors)
    result = ops.forward(cell, input, initial, weights, save, options)
    if result is not None:
        results, saved = result
        return [*results] if saved is None else [*results, saved]
    ops.check_layer(cell, input, initial, weights, options)
    found = _results_of_reference(cell, flags, tensors)
    fresh = [r.clone(memory_format=torch.contiguous_format) for r in found]
    return [*fresh, *(s.zero_() for s in _saved_like(cell, save, input, weights, options))]


def _without_rows(input: Tensor, initial: ops.Tensors, options: ops.Options) -> bool:
    """Whether no sequence has a step, as `ragged` says it: then no result has an element."""
    return (
        options.batch_sizes is not None
        and not options.batch_sizes.numel() + input.shape[0]
        and bool(initial)
        and not initial[0].shape[1]
    )


def _saved_like(
    cell: str, save: bool, input: Tensor, weights: ops.Weights, options: ops.Options
) -> list[Tensor]:
    """A tensor of the shape and dtype of what ops.forward saves; none without `save`."""
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    size = sum(_parts(cell, input, weights, options))
    return [input.new_empty(size, dtype=torch.float32 if narrow else None)] if save else []


def _sizes(cell: str, weights: ops.Weights) -> tuple[int, int, int]:
    """(D, H, size of h) of a layer."""
    weight_hh = weights[1]
    assert weight_hh is not None
    directions = len(weights) // ops.weights_per_direction(weights)
    return directions, weight_hh.shape[0] // ops.CELLS[cell].gates, weight_hh.shape[1]


def _parts(
    cell: str, input: Tensor, weights: ops.Weights, options: ops.Options
) -> tuple[int, int, int]:
    """How many numbers ops.forward saves of the gates, of c or a_hn, and of h, each [D, N, ...]."""
    directions, hidden, size = _sizes(cell, weights)
    info = ops.CELLS[cell]
    again = options.recompute and info.extra > 0  # RNN saves h alone
    rows = directions * prod(input.shape[:-1])
    return (
        0 if again else rows * info.gates * hidden,
        rows * hidden * (info.states - 1 if again else info.extra),
        rows * size if again or ops.weights_per_direction(weights) == 5 else 0,
    )


def _fake_forward(
    cell: str, save: bool, flags: Sequence[bool], *tensors: Tensor | None
) -> list[Tensor]:
    input, initial, weights, options = _unpack(cell, flags, tensors)
    ops.check_layer(cell, input, initial, weights, options, values=False)
    directions, hidden, size = _sizes(cell, weights)
    batch: Any
    if initial:
        batch = initial[0].shape[1]
    elif options.batch_sizes is None:
        batch = input.shape[1]
    else:
        batch = custom_operators.get_ctx().new_dynamic_size()
    rows = input.shape[:-1]
    widths = (size, hidden)[: ops.CELLS[cell].states]
    return [
        input.new_empty(*rows, directions * size),
        *(input.new_empty(directions, batch, width) for width in widths),
        *([input.new_empty(*rows, directions * hidden)] if options.cells else []),
        *_saved_like(cell, save, input, weights, options),
    ]


def _backward(
    cell: str,
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    *arguments: Tensor | None,
) -> list[Tensor]:
    tensors, saved, grads = _split(cell, flags, arguments)
    input, initial, weights, options = _unpack(cell, flags, tensors)
    if _without_rows(input, initial, options):
        return [g.zero_() for g in _fake_backward(cell, groups, needed, flags, *arguments)]
    if ops.takes(cell, input, initial, weights, options):
        states, present = _present(cell, tensors)
        wanted = tuple(needed[i] for i in (0, *states, *present))
        found = ops.backward(
            cell, input, initial, weights, saved, tuple(grads), wanted, options, groups
        )
        if found is not None:
            return [f for f in found if f is not None]
    return list(_plain_gradients(cell, groups, needed, flags, tensors, grads))


def _plain_gradients(
    cell: str,
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    tensors: _Optional,
    grads: _Optional,
) -> tuple[Tensor, ...]:
    """The backward of what the kernels do not take, inside the operator: nobody is watching."""
    if groups:
        return _by_group(_plain_gradients, cell, groups, needed, flags, tensors, grads)
    # Inside an operator's kernel autograd is switched off.
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(include, exclude),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        leaves = [
            t if t is None else t.detach().requires_grad_(n)
            for t, n in zip(tensors, needed, strict=True)
        ]
        results = _results_of_reference(cell, flags, leaves)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            [t for t, n in zip(leaves, needed, strict=True) if n and t is not None],
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    return tuple(f.clone(memory_format=torch.contiguous_format) for f in found)


def _split(
    cell: str, flags: Sequence[bool], arguments: _Optional
) -> tuple[_Optional, Tensor, _Optional]:
    """(tensors, saved, grads) of the backward operator's arguments."""
    states = ops.CELLS[cell].states
    count = 1 + states + _WEIGHTS + 2
    saved = arguments[count]
    assert saved is not None
    grads = arguments[count + 1 :]
    return arguments[:count], saved, grads[: 1 + states + ops.Options(None, None, *flags).cells]


def _fake_backward(
    cell: str,
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    *arguments: Tensor | None,
) -> list[Tensor]:
    tensors, _, _ = _split(cell, flags, arguments)
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


def _one_at_a_time(cell: str, in_dims: Sequence[int | None], tensors: _Optional) -> bool:
    """Whether the samples of a vmap are no larger batch: see the top of this file."""
    states = 1 + ops.CELLS[cell].states
    return tensors[states + _WEIGHTS] is not None or any(
        d is not None for d in in_dims[states : states + _WEIGHTS]
    )


def _vmap_forward(
    apply: Callable[..., Any],
    cell: str,
    size: int,
    in_dims: Sequence[Any],
    save: bool,
    flags: Sequence[bool],
    *tensors: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    in_dims = in_dims[2:]
    if _one_at_a_time(cell, in_dims, tensors):
        return _one_by_one(partial(apply, save, flags), size, in_dims, tensors)
    states = 1 + ops.CELLS[cell].states
    of_batch = (*range(states), len(tensors) - 1)
    folded = [
        _fold(t, d, size) if i in of_batch else t
        for i, (t, d) in enumerate(zip(tensors, in_dims, strict=True))
    ]
    results = apply(save, flags, *folded)
    unfolded = [_unfold(r, size) for r in results[: len(results) - save]]
    dims = [1] * len(unfolded)
    if save:
        rows, widths = _rows_and_widths(cell, flags, folded)
        parts = _parts_by_rows(results[-1], rows, widths)
        unfolded.append(torch.cat([p.reshape(rows, size, -1) for p in parts], 2))
        dims.append(1)
    return tuple(unfolded), tuple(dims)


def _rows_and_widths(cell: str, flags: Sequence[bool], tensors: _Optional) -> tuple[int, list[int]]:
    """D*T, and how many numbers each of the `_parts` has for one of them."""
    input, _, weights, options = _unpack(cell, flags, tensors)
    rows = _sizes(cell, weights)[0] * input.shape[0]
    return rows, [p // rows for p in _parts(cell, input, weights, options)]


def _parts_by_rows(saved: Tensor, rows: int, widths: list[int]) -> list[Tensor]:
    """The parts, each [rows, width], of what the operator saves, or a vmap leaves of it.

    The operator has them one behind the other. A vmap's samples have them side by side, [rows, the
    sum of widths]: there they are one part of a larger batch's, without being copied twice.
    """
    if saved.dim() == 2:
        return list(torch.split(saved, widths, 1))
    return [p.view(rows, -1) for p in torch.split(saved, [rows * w for w in widths])]


def _vmap_backward(
    apply: Callable[..., Any],
    cell: str,
    size: int,
    in_dims: Sequence[Any],
    groups: int,
    needed: Sequence[bool],
    flags: Sequence[bool],
    *arguments: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    in_dims = in_dims[3:]
    if _one_at_a_time(cell, in_dims, arguments):
        return _one_by_one(partial(apply, groups, needed, flags), size, in_dims, arguments)
    tensors, saved, _ = _split(cell, flags, arguments)
    states, count = 1 + ops.CELLS[cell].states, len(tensors)
    folded = [
        t if states <= i < count - 1 or i == count else _fold(t, d, size)
        for i, (t, d) in enumerate(zip(arguments, in_dims, strict=True))
    ]
    rows, all_widths = _rows_and_widths(cell, flags, folded[:count])
    widths = [w // size for w in all_widths]
    dim = in_dims[count]
    if dim is None:
        parts = [p.unsqueeze(1).expand(-1, size, -1) for p in _parts_by_rows(saved, rows, widths)]
    elif saved.dim() == 3:
        parts = list(torch.split(saved.movedim(dim, 1), widths, 2))
    else:
        each = torch.split(saved.movedim(dim, 0), [rows * w for w in widths], 1)
        parts = [p.reshape(size, rows, -1).transpose(0, 1) for p in each]
    folded[count] = flat = saved.new_empty(rows * sum(all_widths))
    for part, to in zip(parts, _parts_by_rows(flat, rows, all_widths), strict=True):
        to.view(part.shape).copy_(part)
    found = apply(max(groups, 1) * size, needed, flags, *folded)
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
    """apply(cell, redispatch, save, flags, *tensors): records the forward operator."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        redispatch: Any,
        save: bool,
        flags: Sequence[bool],
        *tensors: Tensor | None,
    ) -> Any:
        *results, saved = redispatch(True, flags, *tensors)
        ctx.cell, ctx.flags, ctx.count = cell, flags, len(results)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)
        if not save:
            return tuple(results)
        ctx.mark_non_differentiable(saved)
        return *results, saved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, saved = ctx.saved_tensors
        cell, flags, grads = ctx.cell, ctx.flags, grads[: ctx.count]
        needs = ctx.needs_input_grad[4:]
        needed = [n and t is not None for n, t in zip(needs, tensors, strict=True)]
        found: Any = ()
        if all(g is None for g in grads):
            needed = [False] * len(tensors)
        elif forward_ad._current_level >= 0:
            found = _gradients_of_reference(cell, 0, needed, flags, tensors, grads)
        elif any(needed):
            absent = [None] * (len(_RESULTS[cell]) - len(grads))
            found = _BACKWARD[cell](0, needed, flags, *tensors, saved, *grads, *absent)
        gradients = iter(found)
        return None, None, None, None, *(next(gradients) if n else None for n in needed)


class _Backward(Function):
    """apply(cell, redispatch, groups, needed, flags, *arguments): records the backward operator."""

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        redispatch: Any,
        groups: int,
        needed: Sequence[bool],
        flags: Sequence[bool],
        *arguments: Tensor | None,
    ) -> Any:
        ctx.constants = cell, groups, needed, flags
        ctx.save_for_backward(*arguments)
        return tuple(redispatch(groups, needed, flags, *arguments))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        cell, groups, needed, flags = ctx.constants
        arguments = ctx.saved_tensors
        count = len(_split(cell, flags, arguments)[0])  # where `saved` is, which has no gradient
        needs = ctx.needs_input_grad[5:]
        wanted = [
            i
            for i, (t, n) in enumerate(zip(arguments, needs, strict=True))
            if n and t is not None and i != count
        ]

        def gradients(*chosen: Tensor) -> tuple[Tensor, ...]:
            replaced = list(arguments)
            for i, t in zip(wanted, chosen, strict=True):
                replaced[i] = t
            tensors, _, grads = _split(cell, flags, replaced)
            return _gradients_of_reference(cell, groups, needed, flags, tensors, grads)

        vjp = torch.func.vjp(gradients, *(arguments[i] for i in wanted))[1]
        found = dict(zip(wanted, vjp(cotangents), strict=True))
        return None, None, None, None, None, *(found.get(i) for i in range(len(arguments)))


def _autograd_kernel(
    cell: str,
    operator: Any,
    function: type[Function],
    composed: Callable[..., Any],
    keyset: Any,
    *arguments: Any,
) -> list[Tensor]:
    """What the dispatcher calls for autograd, at every level of torch.func's that has any."""
    if forward_ad._current_level >= 0:
        return composed(cell, *arguments)  # type: ignore[no-any-return]

    def redispatch(*arguments: Any) -> Any:
        # Grad mode is of the levels below, and autograd switches it off inside a Function.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(  # type: ignore[no-any-return]
                keyset & torch._C._after_autograd_keyset, *arguments
            )
    with enable_single_level_autograd_function():
        # Function.apply itself would begin with torch.func's levels, of which this is one.
        return list(super(Function, function).apply(cell, redispatch, *arguments))  # type: ignore[misc]


def _forward_composed(
    cell: str, save: bool, flags: Sequence[bool], *tensors: Tensor | None
) -> list[Tensor]:
    input, _, weights, options = _unpack(cell, flags, tensors)
    saved = _saved_like(cell, save, input, weights, options)
    return [*_results_of_reference(cell, flags, tensors), *(s.zero_() for s in saved)]


def _backward_composed(*arguments: Any) -> Any:
    raise NotImplementedError("fusedrnn's backward operators have no forward-mode derivative")


# The operators -----------------------------------------------------------------------------------

_LIBRARY: Any = custom_operators.Library("fusedrnn", "DEF")  # type: ignore[no-untyped-call]
# Those that may have gradients.
_RESULTS = {
    cell: ("output", "h_n", "c_n", "cells")[: 2 * info.states] for cell, info in ops.CELLS.items()
}


def _define(cell: str) -> tuple[Any, Any]:
    """(forward, backward) operator of a cell."""
    states = ("h0", "c0")[: ops.CELLS[cell].states]
    names = [
        f"{name}{direction}"
        for direction in ("", "_reverse")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    ]
    optional = [f"Tensor? {name}" for name in (*states, *names, "batch_sizes", "reset")]
    tensors = ", ".join(["Tensor input", *optional])
    for name in names[:2]:
        tensors = tensors.replace(f"Tensor? {name},", f"Tensor {name},")
    grads = ", ".join(f"Tensor? grad_{name}" for name in _RESULTS[cell])
    forward, backward = f"{cell}_forward", f"{cell}_backward"
    schemas = {
        forward: f"(bool save, bool[] flags, {tensors}) -> Tensor[]",
        backward: f"(int groups, bool[] needed, bool[] flags, {tensors}, Tensor saved, {grads})"
        " -> Tensor[]",
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
        *autograd: Any,
    ) -> None:
        _LIBRARY.impl(name, partial(kernel, cell), "CompositeExplicitAutograd")
        recorded = partial(_autograd_kernel, cell, operator, *autograd)
        _LIBRARY.impl(name, recorded, "Autograd", with_keyset=True)
        custom_operators.register_fake(f"fusedrnn::{name}", partial(fake, cell), lib=_LIBRARY)

        def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return vmap(operator, cell, info.batch_size, in_dims, *arguments)

        custom_operators.register_vmap(f"fusedrnn::{name}", rule, lib=_LIBRARY)

    first, second = operators
    register(forward, first, _forward, _fake_forward, _vmap_forward, _Forward, _forward_composed)
    register(
        backward, second, _backward, _fake_backward, _vmap_backward, _Backward, _backward_composed
    )
    return first, second


_OPERATORS = {cell: _define(cell) for cell in ops.CELLS}
_FORWARD = {cell: forward for cell, (forward, _) in _OPERATORS.items()}
_BACKWARD = {cell: backward for cell, (_, backward) in _OPERATORS.items()}


def _fake_ragged(lengths: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = custom_operators.get_ctx().new_dynamic_size
    rows, batch_sizes, order = (lengths.new_empty(size(), dtype=torch.int64) for _ in range(3))
    return rows, batch_sizes, order


_LIBRARY.define(
    "ragged(Tensor lengths, Tensor first, SymInt stride, SymInt seq_len)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("ragged", extensions.rows_of, "CompositeExplicitAutograd")
custom_operators.register_fake("fusedrnn::ragged", _fake_ragged, lib=_LIBRARY)
