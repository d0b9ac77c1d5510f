"""`explain`: in words, what computes a call of a module, and why. Computes nothing itself.

It asks what modules.py asks, in the same order; tests/test_explain.py holds the two together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.nn.utils.rnn import PackedSequence

from fusedrnn import cuda, modules, ops, prepacking
from fusedrnn.extensions import from_jagged, is_jagged
from fusedrnn.functional import autocast_dtype, autocast_options, converted


def explain(module: nn.Module, input: Any, hx: Any = None) -> str:
    """What `module(input, hx)` would be computed by, here and now, as a text of some lines.

    `module` is an LSTM, GRU, RNN or a cell of fusedrnn or of torch.nn; `input` and `hx` are what it
    would be called with; `lengths`, `reset_mask` and `return_cell_states` run where the same call
    without them does. The first line begins with "kernels", "reference" or "torch.nn". TypeError
    for another module.
    """
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and not isinstance(module, modules._Fused):
        return (
            f"torch.nn: this is {_name(type(module))}, not one of fusedrnn's modules. "
            "fusedrnn.replace(model) changes those inside a model."
        )
    if not isinstance(module, modules._Fused):
        raise TypeError(
            "explain takes an LSTM, GRU, RNN or one of their cells, got "
            f"{_name(type(module))}; call it for the modules inside"
        )
    if isinstance(module, nn.RNNBase) and is_jagged(input):
        ragged = from_jagged(input)
        if len(ragged.order) == 0:
            return "kernels: for none of the sequences, which are all empty."
        input = PackedSequence(ragged.gather(input.values()), ragged.batch_sizes)
        states = [s.index_select(1, ragged.order) for s in _states(hx)]
        hx = None if hx is None else states[0] if isinstance(hx, Tensor) else tuple(states)
    reason = _why_torch(module, input, hx)
    if reason is not None:
        return f"torch.nn: {reason}."
    layers = _layers(module, input, hx)
    cell, first, _, weights, options = layers[0]
    hidden: Any = module.hidden_size
    if first.is_cuda:
        reason = cuda.unavailable(first.device)
        if reason is not None:
            return f"torch.nn: {reason}."
        if cuda.forced == "torch":
            return "torch.nn: FUSEDRNN_KERNEL=torch asks for it."
        if isinstance(module, nn.RNNCellBase):
            return "torch.nn: one step alone is no work for a kernel of its own on a GPU."
    elif (
        options is None
        and ops.weights_per_direction(weights) == 4
        and modules._torch_is_faster(cell, hidden, first)
    ):
        return "torch.nn: its bfloat16 products are faster on this CPU at this shape."
    dtype = None
    if ops.only_autocast():
        dtype = autocast_dtype(*layers[0])
        if dtype is not None:
            layers = [
                (cell, *converted(dtype, *layer[1:4]), autocast_options(layer[1], layer[4]))
                for layer in layers
            ]
    elif ops.watched():
        if ops.only_transformed() and first.dtype in ops.DTYPES and first.device.type == "cpu":
            return "kernels: through an operator that has rules for torch.func (library.py)."
        return "reference: its operations have the rules of torch.func and forward-mode AD."
    kept = prepacking.keeps(module)
    if first.is_cuda:
        try:
            alone = len(layers) == 1 and cuda.cudnn_takes(module.training)
            plans: list[Any] = [cuda.choice(*layer, alone=alone) for layer in layers]
        except RuntimeError as error:  # the call's own: no code for this GPU, say
            return f"error: {error}"
    else:
        plans = [ops.plan(*layer, kept=kept) for layer in layers]
    if None in plans:
        try:
            for layer in layers:
                ops.check_layer(*layer)
        except RuntimeError as error:
            return f"torch.nn: a shape does not fit, and the error is torch's ({error})."
        return f"torch.nn: {_why_not_ordinary(*layers[plans.index(None)][1:4])}."
    on_cuda = isinstance(plans[0], cuda.Rule)
    if on_cuda and plans[0].path == "torch":
        return f"torch.nn: {plans[0].why}."
    dtype_of_call = layers[0][1].dtype
    arithmetic = (
        cuda.arithmetic(dtype_of_call) if on_cuda else _arithmetic(dtype_of_call, plans[0], weights)
    )
    if dtype is not None:
        arithmetic += f" under autocast, results in {str(dtype)[6:]}"
    lines = [f"kernels: {'CUDA' if on_cuda else ops.isa()}, {arithmetic}."]
    for i, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        where = f"Layer {i}: " if len(layers) > 1 else ""
        words = f"{plan.path} path: {plan.why}." if on_cuda else _plan_in_words(plan, kept, *layer)
        lines.append(where + words)
    return "\n".join(lines)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _states(hx: Any) -> Any:
    return hx if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)


def _why_torch(module: Any, input: Any, hx: Any) -> str | None:
    """What modules.py sees before it asks the kernels; None if nothing."""
    states = _states(hx)
    packed = isinstance(input, PackedSequence)
    if packed:
        input = input.data
    if not isinstance(input, Tensor) or not all(isinstance(s, Tensor) for s in states):
        return "the input or hx is no tensor, and the error is torch's"
    if _is_any_autocast_enabled() and not ops.only_autocast():
        return "autocast is active where torch's operations are transformed or recorded"
    if _get_tracing_state() or (_len_torch_dispatch_stack() and not ops.transformed()):
        return "torch's operations are being recorded (torch.jit.trace or a dispatch mode)"
    of_layers = isinstance(module, nn.RNNBase)
    dims = input.dim() + packed
    if dims not in ((2, 3) if of_layers else (1, 2)):
        return f"the input has {dims} dimensions, and the error is torch's"
    if hx is not None and (
        len(states) != module._num_states or isinstance(hx, Tensor) != (len(states) == 1)
    ):
        return "hx is not what this module takes, and the error is torch's"
    if input.shape[-1] != module.input_size:
        return (
            f"the input has {input.shape[-1]} features where the module expects "
            f"{module.input_size}, and the error is torch's"
        )
    expected = dims if of_layers or dims == 2 else 1
    if any(s.dim() != expected for s in states):
        return "hx has not as many dimensions as the input, and the error is torch's"
    return None


def _layers(
    module: Any, input: Any, hx: Any
) -> list[tuple[str, Tensor, Any, Any, ops.Options | None]]:
    """What `ops.plan` takes, of each layer; inputs after the first invented."""
    weights: Any
    options = None
    states = list(_states(hx))
    if isinstance(module, nn.RNNCellBase):
        if input.dim() == 1:
            input, states = input.unsqueeze(0), [s.unsqueeze(0) for s in states]
        weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
        if isinstance(module, nn.RNNCell):
            return [(f"rnn_{module.nonlinearity}", input, states, weights, None)]
        return [("lstm" if module._num_states == 2 else "gru", input, states, weights, None)]
    directions = 2 if module.bidirectional else 1
    if isinstance(input, PackedSequence):
        options = ops.Options(input.batch_sizes)
        input = input.data
    elif input.dim() == 2:
        input, states = input.unsqueeze(1), [s.unsqueeze(1) for s in states]
    elif module.batch_first:
        input = input.transpose(0, 1)
    if module.recompute_gates:
        options = (options or ops.Options())._replace(recompute=True)
    layers = []
    for i in range(0, len(module.all_weights), directions):
        both = module.all_weights[i : i + directions]
        biases = () if module.bias else (None, None)
        weights = [w for one in both for w in (*one[:2], *biases, *one[2:])]
        initial = [s[i : i + directions] for s in states]
        layers.append((module.mode.lower(), input, initial, weights, options))
        size = directions * (module.proj_size or module.hidden_size)
        input = input.new_empty(*input.shape[:-1], size)
    return layers


def _why_not_ordinary(input: Tensor, initial: Any, weights: Any) -> str:
    tensors = [t for t in (input, *initial, *weights) if t is not None]
    dtypes = {t.dtype for t in tensors}
    devices = {t.device.type for t in tensors}
    if len(dtypes) > 1:
        return f"input, hx and weights are of several dtypes ({', '.join(map(str, dtypes))})"
    if devices not in ({"cpu"}, {"cuda"}):
        return f"the tensors are on {', '.join(sorted(devices))}: the kernels are for CPU or CUDA"
    if not dtypes <= {torch.float32, torch.float64, torch.float16, torch.bfloat16}:
        return f"the kernels do not compute {input.dtype}"
    return "a tensor is no ordinary one (a subclass, sparse, or without memory of its own)"


def _arithmetic(dtype: torch.dtype, plan: ops.Plan, weights: Any) -> str:
    if plan.precision != "highest":
        what = "bfloat16" if plan.precision == "medium" else "two bfloat16 parts each"
        return f"numbers multiplied as {what}, sums and states in float32, results rounded once"
    if dtype in (torch.float16, torch.bfloat16):
        return f"{str(dtype)[6:]} widened to float32 once, results rounded once"
    precision = ops.precision()
    if dtype is not torch.float32 or precision == "highest":
        return str(dtype)[6:]
    if precision == "high" and not ops.SPLIT_PRODUCTS:
        why = f"products of that precision would not be faster with {ops.isa()}"
    elif precision == "medium" and not ops.BF16_PRODUCTS:
        why = "this CPU has no instruction for bfloat16 products that the kernels use"
    elif ops.weights_per_direction(weights) == 5:
        why = "a layer with a projection has no kernel of less precision"
    else:
        why = "so few steps do not pay for another layout of the weights"
    return f"float32 (torch's float32_matmul_precision is {precision!r}, but {why})"


def _plan_in_words(
    plan: ops.Plan,
    kept: bool,
    cell: str,
    input: Tensor,
    initial: Any,
    weights: Any,
    options: ops.Options | None,
) -> str:
    steps = input.shape[0] if input.dim() == 3 else 1
    if options is not None and options.batch_sizes is not None:
        steps = len(options.batch_sizes)
    if plan.packed:
        words = (
            f"weights laid out {'once, by prepacked' if kept else 'anew for the call'}, so that a "
            "register tile holds all gates of its units; input projected "
            f"{plan.chunk} step{'s' * (plan.chunk > 1)} at a time"
        )
    else:
        words = f"weights read as they lie in memory: {steps} step(s) do not pay for another layout"
    if plan.threads == 1:
        available = torch.get_num_threads()
        return f"{words}; one thread" + (
            f" of {available}: the work does not pay for more." if available > 1 else "."
        )
    splits = []
    if len(weights) in (8, 10):
        splits.append("the directions run side by side")
    if plan.row_shards > 1:
        splits.append(f"the batch is split in {plan.row_shards}, which never wait for each other")
    if plan.unit_shards > 1:
        splits.append(
            f"the hidden units are split in {plan.unit_shards}, which meet after every step"
        )
    return f"{words}; {plan.threads} threads: {'; '.join(splits)}."
