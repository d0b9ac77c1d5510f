"""One layer of LSTM, GRU or RNN as a differentiable function, and the autograd Functions under it.

Shapes, for one layer with D directions: input [T, B, I] of any strides, h0 and c0 [D, B, H]
(expanded ones too), output [T, B, D*H]. `weights` holds four entries per direction: weight_ih
[G*H, I], weight_hh [G*H, H], bias_ih and bias_hh [G*H] or None. G is 4 for LSTM (gate order i, f,
g, o), 3 for GRU (r, z, n), 1 for RNN. One step alone: input [B, I], states and results [B, H]. An
LSTM with a projection has a fifth entry, weight_hr [P, H]; then weight_hh is [G*H, P], h0 [D, B, P]
and the output [T, B, D*P]. Definitions, and their sources, are torch.nn's: see reference.py.

The four floating-point dtypes run in the kernels on the CPU, and on CUDA devices but for one step
alone, first derivatives included; on the CPU under torch.compile and torch.func too, through the
operators of library.py. Whatever else torch can do with such a function (other dtypes and devices,
double backward, forward mode) is computed by reference.py, and counted: `ops.counts`.

Under autocast on a CUDA device the kernels compute in its dtype, and give results of it. On the CPU
they compute in float32, where it would convert to its own dtype, and round the results once; under
bfloat16's they also round what they multiply, on CPUs that multiply bfloat16. The results' dtype is
torch.nn's: autocast's own for LSTM and RNN, and for a step of RNN; the wider of that and
of the initial state (without one, of the input) for GRU and for a step of LSTM. torch.nn.LSTM gives
other dtypes for some float16 inputs and raises for others, and its layers give float16 under
bfloat16's autocast on a CUDA device; here it is the same rule for all.
float64 stays float64, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function
from torch.compiler import is_compiling

from fusedrnn import library, ops, reference
from fusedrnn.reference import Weights

__all__ = [
    "GRUFunction",
    "LSTMFunction",
    "RNNFunction",
    "gru",
    "layer",
    "lstm",
    "rnn",
]


def lstm(input: Tensor, h0: Tensor, c0: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer: (output [T, B, D*H], h_n [D, B, H], c_n [D, B, H]); of one step, input
    [B, I], (h, h, c), each [B, H].

    Raises RuntimeError where a shape, dtype or device does not fit. Without states: `layer`.
    """
    results = layer("lstm", input, (h0, c0), weights)
    return results[0], results[-2], results[-1]


def gru(input: Tensor, h0: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """One GRU layer: (output [T, B, D*H], h_n [D, B, H]); of one step, input [B, I], (h, h), each
    [B, H].

    Raises RuntimeError where a shape, dtype or device does not fit. Without h0: `layer`.
    """
    results = layer("gru", input, (h0,), weights)
    return results[0], results[-1]


def rnn(
    input: Tensor, h0: Tensor, weights: Weights, nonlinearity: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """One vanilla RNN layer, nonlinearity "tanh" or "relu": (output [T, B, D*H], h_n [D, B, H]); of
    one step, input [B, I], (h, h), each [B, H].

    Raises RuntimeError where a shape, dtype or device does not fit, ValueError for another
    nonlinearity. Without h0: `layer`.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    results = layer(f"rnn_{nonlinearity}", input, (h0,), weights)
    return results[0], results[-1]


def layer(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Weights,
    options: ops.Options | None = None,
) -> tuple[Tensor, ...]:
    """One layer of `cell`, a key of ops.CELLS: (output, h_n) or, for "lstm", (output, h_n, c_n).

    `initial` is (h0,) or (h0, c0) or, for zeros, (). Also one step: with input [B, I] and states
    [B, H] the results are (h,) or (h, c), each [B, H]. All tensors are of one dtype and on one
    device. Raises ValueError for another `cell`, RuntimeError where a shape, dtype or device does
    not fit.

    `options` are for sequences of several lengths, for boundaries within them and for c of all
    steps as one more result: see ops.Options.
    """
    if cell not in ops.CELLS:
        raise ValueError(f"cell must be one of {', '.join(ops.CELLS)}, got {cell!r}")
    initial, weights = tuple(initial), tuple(weights)
    if is_compiling():
        return _layer_in_graph(cell, input, initial, weights, options)
    results = kernel_layer(cell, input, initial, weights, options)
    if results is None:
        results = autocast_layer(cell, input, initial, weights, options)
    if results is None:
        ops.check_layer(cell, input, initial, weights, options)
        results = other_layer(cell, input, initial, weights, options)
    return results


def _layer_in_graph(
    cell: str,
    input: Tensor,
    initial: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    options: ops.Options | None,
) -> tuple[Tensor, ...]:
    """`layer` while torch.compile or torch.export builds a graph."""
    results = graph_layer(cell, input, initial, weights, options)
    return reference_layer(cell, input, initial, weights, options) if results is None else results


def graph_layer(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
) -> tuple[Tensor, ...] | None:
    """`layer` as one operator of a graph, with autocast's conversions; None for tensors that it
    does not take.

    RuntimeError where a shape does not fit. Values are checked where the graph runs.
    """
    ops.check_layer(cell, input, initial, weights, options, values=False)
    numbers = [t for t in (input, *initial, *weights) if t is not None]
    others = [t for t in (options or ())[:2] if t is not None]
    if not library.fits_a_graph((*numbers, *others)):
        return None
    dtypes = {t.dtype for t in numbers}
    dtype = autocast_dtype(cell, input, initial, weights, options)
    if dtype is None and (len(dtypes) > 1 or input.dtype not in ops.DTYPES):
        return None
    if dtype is None:
        return library.layer(cell, input, initial, weights, options)
    options = autocast_options(input, options)
    results = library.layer(cell, *converted(dtype, input, initial, weights), options)
    return tuple(r.to(dtype) for r in results)


def kernel_layer(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
    panels: Any = None,
    even_if_watched: bool = False,
) -> tuple[Tensor, ...] | None:
    """`layer` by the kernels; None where they do not take the call, or somebody is ops.watched().

    panels: of the weights, see ops.forward. Under autocast see `autocast_layer`.
    """
    if not even_if_watched and ops.watched():
        return None
    if torch.is_grad_enabled():
        tensors = (input, *initial, *weights)
        try:
            recorded = any([t is not None and t.requires_grad for t in tensors])
        except RuntimeError:  # a subclass that does not say, such as ExpandedWeight
            return None
        if recorded and not torch.is_inference_mode_enabled():  # torch records nothing there
            return _APPLY[cell](cell, len(initial), options, *tensors)  # type: ignore[no-any-return]
    result = ops.forward(cell, input, initial, weights, False, options, panels)
    return None if result is None else result[0]


def autocast_layer(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
    panels: Any = None,
) -> tuple[Tensor, ...] | None:
    """`kernel_layer` under autocast; None also where there is none, or other things watch too."""
    if input.device.type not in _AUTOCAST_DEVICES or not ops.only_autocast():
        return None
    dtype = autocast_dtype(cell, input, initial, weights, options)
    if dtype is None:
        return kernel_layer(cell, input, initial, weights, options, panels, even_if_watched=True)
    options = autocast_options(input, options)
    input, initial, weights = converted(dtype, input, initial, weights)
    results = kernel_layer(cell, input, initial, weights, options, panels, even_if_watched=True)
    return None if results is None else tuple(r.to(dtype) for r in results)


_AUTOCAST_DEVICES = ("cpu", "cuda")


def converted(
    dtype: torch.dtype, input: Tensor, initial: ops.Tensors, weights: ops.Weights
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """What the kernels take under autocast, where it converts and the results are to be `dtype`.

    On the CPU float32, in which they compute anyway; on CUDA `dtype`, for its tensor cores.
    """
    if input.device.type == "cpu":
        dtype = torch.float32
    return (
        input.to(dtype),
        [s.to(dtype) for s in initial],
        [w if w is None else w.to(dtype) for w in weights],
    )


def autocast_options(input: Tensor, options: ops.Options | None) -> ops.Options | None:
    """The options with bf16, under autocast to bfloat16 on the CPU."""
    if not autocast_is_bf16() or input.device.type != "cpu":
        return options
    return _BF16 if options is None else options._replace(bf16=True)


_BF16 = ops.Options(bf16=True)


def autocast_is_bf16() -> bool:
    """Whether autocast to bfloat16 is active on the CPU."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def autocast_dtype(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
) -> torch.dtype | None:
    """The dtype of the results where autocast converts; None where the kernels are to compute with
    the tensors as they are.
    """
    device = input.device.type
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    low = torch.get_autocast_dtype(device)
    dtypes = {t.dtype for t in (input, *initial, *weights) if t is not None}
    if dtypes == {low} or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return None
    padded_lstm = cell == "lstm" and input.dim() == 3
    if (
        device == "cuda"
        or cell.startswith("rnn")
        or padded_lstm
        or ops.weights_per_direction(weights) == 5
    ):
        return low
    return torch.promote_types(low, initial[-1].dtype if initial else input.dtype)


def other_layer(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
) -> tuple[Tensor, ...]:
    """`layer` where `kernel_layer` is None: under torch.func alone by operators that have rules for
    it, otherwise by the reference; in the dtypes of `autocast_layer`. Checks nothing."""
    dtype = autocast_dtype(cell, input, initial, weights, options)
    if dtype is not None:
        options = autocast_options(input, options)
        device = input.device.type
        input, initial, weights = converted(dtype, input, initial, weights)
        with torch.autocast(device, enabled=False):
            results = other_layer(cell, input, initial, weights, options)
        return tuple(r.to(dtype) for r in results)
    if ops.only_transformed() and input.device.type == "cpu":
        return library.layer(cell, input, initial, weights, options)
    return reference_layer(cell, input, initial, weights, options)


def reference_layer(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Weights,
    options: ops.Options | None = None,
) -> tuple[Tensor, ...]:
    """`layer` in plain torch operations, for whatever the kernels do not take."""
    if not is_compiling():  # a graph would be built anew whenever the counter differs
        ops.count("reference")
    options = options or ops.Options()
    one_step = input.dim() == 2 and options.batch_sizes is None
    if one_step:
        input, initial = input.unsqueeze(0), [s.unsqueeze(0) for s in initial]
    results = reference.scan(cell, input, tuple(initial), weights, *options[:4])
    return tuple(r.squeeze(0) for r in results[1:]) if one_step else results


def _unpack(
    num_states: int, tensors: Sequence[Any]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(input, initial, weights) of a Function's tensors."""
    first_weight = 1 + num_states
    return tensors[0], tuple(tensors[1:first_weight]), tuple(tensors[first_weight:])


class _SequenceFunction(Function):
    """apply(cell, number of initial states, options, input, [h0, [c0,]] *weights) -> the results of
    `layer`; no initial states: zeros.

    The input projection is inside, not before it: so the pre-activations' memory is reused for the
    gates that backward needs, and double backward has everything it starts from.
    """

    @classmethod
    def apply(
        cls, cell: str, num_states: int, options: ops.Options | None, *tensors: Tensor | None
    ) -> Any:
        results = super().apply(cell, num_states, options, *tensors)  # type: ignore[no-untyped-call]
        if results is None:
            ops.check_layer(cell, *_unpack(num_states, tensors), options)
            raise RuntimeError(
                "Expected dense tensors of one floating-point dtype on one device, got "
                + ", ".join(f"{t.dtype} on {t.device}" for t in tensors if t is not None)
            )
        return results

    @staticmethod
    def forward(
        ctx: Any, cell: str, num_states: int, options: ops.Options | None, *tensors: Tensor | None
    ) -> Any:
        result = ops.forward(cell, *_unpack(num_states, tensors), True, options)
        if result is None:
            return None
        results, saved = result
        ctx.cell = cell
        ctx.num_states = num_states
        ctx.precision = ops.precision()
        ctx.flags = None if options is None else options[2:]
        ctx.set_materialize_grads(False)
        if options is None:
            ctx.save_for_backward(*tensors, saved)
        else:
            ctx.save_for_backward(*tensors, saved, *options[:2])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if _is_any_autocast_enabled():  # which is for forward passes
            for device in _AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return _SequenceFunction.backward(ctx, *grads)
        cell, num_states, needed = ctx.cell, ctx.num_states, ctx.needs_input_grad[3:]
        if ctx.flags is None:
            *tensors, saved = ctx.saved_tensors
            options = None
        else:
            *tensors, saved, batch_sizes, reset = ctx.saved_tensors
            options = ops.Options(batch_sizes, reset, *ctx.flags)
        if all([g is None for g in grads]):
            return (None,) * (3 + len(tensors))
        found: Sequence[Tensor | None] | None = None
        if not torch.is_grad_enabled() and (not ops.watched() or ops.only_autocast()):
            arguments = (*_unpack(num_states, tensors), saved, grads, needed, options)
            found = ops.backward(cell, *arguments, 0, ctx.precision)
        if found is None:
            found = _reference_backward(cell, num_states, options, tensors, grads, needed)
        return None, None, None, *found


# One name each, as autograd's graph and torch.profiler show them.
class LSTMFunction(_SequenceFunction):
    """apply("lstm", 2 or 0, options, input, [h0, c0,] *weights) -> (output, h_n, c_n)."""


class GRUFunction(_SequenceFunction):
    """apply("gru", 1 or 0, options, input, [h0,] *weights) -> (output, h_n)."""


class RNNFunction(_SequenceFunction):
    """apply("rnn_tanh" or "rnn_relu", 1 or 0, options, input, [h0,] *weights) -> (output, h_n)."""


_FUNCTIONS = {
    "lstm": LSTMFunction,
    "gru": GRUFunction,
    "rnn_tanh": RNNFunction,
    "rnn_relu": RNNFunction,
}
# Function.apply without its first half, which looks for functorch (ops.watched has): 2.6 us a call.
# None, with nothing recorded, where the kernels do not take the tensors.
_APPLY: dict[str, Any] = {name: super(Function, f).apply for name, f in _FUNCTIONS.items()}


def _reference_backward(
    cell: str,
    num_states: int,
    options: ops.Options | None,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as differentiable functions of everything they depend on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor passed twice (h0 as c0, say) is two inputs here.
        inputs = [t if t is None else t.view_as(t) for t in tensors]
        results = reference_layer(cell, *_unpack(num_states, inputs), options)
        wanted = [t for t, n in zip(inputs, needed, strict=True) if n and t is not None]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [r for r, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=differentiable,
                allow_unused=True,
            )
        )
    return [
        next(found) if n and t is not None else None for t, n in zip(tensors, needed, strict=True)
    ]
