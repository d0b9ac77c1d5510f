"""One layer of LSTM, GRU or RNN as a differentiable function, and the autograd Functions under it.

Shapes, for one layer with D directions: input [T, B, I] of any strides, h0 and c0 [D, B, H]
(expanded ones too), output [T, B, D*H]. `weights` holds four entries per direction: weight_ih
[G*H, I], weight_hh [G*H, H], bias_ih and bias_hh [G*H] or None. G is 4 for LSTM (gate order i, f,
g, o), 3 for GRU (r, z, n), 1 for RNN. Definitions, and their sources, are torch.nn's: see
reference.py.

float32 and float64 on the CPU run in the kernels, first derivatives included. Whatever else torch
can do with such a function (other dtypes and devices, double backward, forward mode, torch.func)
is computed by reference.py, and counted: `ops.counts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fusedrnn import ops, reference
from fusedrnn.ops import supported
from fusedrnn.reference import Weights

__all__ = [
    "GRUFunction",
    "LSTMFunction",
    "RNNFunction",
    "gru",
    "layer",
    "lstm",
    "rnn",
    "supported",
]


def lstm(input: Tensor, h0: Tensor, c0: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer: (output [T, B, D*H], h_n [D, B, H], c_n [D, B, H]).

    Raises RuntimeError where a shape does not fit.
    """
    output, h_n, c_n = layer("lstm", input, (h0, c0), weights)
    return output, h_n, c_n


def gru(input: Tensor, h0: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """One GRU layer: (output [T, B, D*H], h_n [D, B, H]).

    Raises RuntimeError where a shape does not fit.
    """
    output, h_n = layer("gru", input, (h0,), weights)
    return output, h_n


def rnn(
    input: Tensor, h0: Tensor, weights: Weights, nonlinearity: str = "tanh"
) -> tuple[Tensor, Tensor]:
    """One vanilla RNN layer, nonlinearity "tanh" or "relu": (output [T, B, D*H], h_n [D, B, H]).

    Raises RuntimeError where a shape does not fit, ValueError for another nonlinearity.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    output, h_n = layer(f"rnn_{nonlinearity}", input, (h0,), weights)
    return output, h_n


def layer(
    cell: str, input: Tensor, initial: Sequence[Tensor], weights: Weights
) -> tuple[Tensor, ...]:
    """One layer of `cell`, a key of ops.CELLS: (output, h_n) or, for "lstm", (output, h_n, c_n).

    `initial` is (h0,) or (h0, c0). Also one step: with input [B, I] and states [B, H] all results
    are [B, H]. Raises RuntimeError where a shape does not fit.
    """
    ops.check_layer(cell, input, initial, weights)
    if supported(input, *initial, *weights):
        return kernel_layer(cell, input, initial, weights)
    return reference_layer(cell, input, initial, weights)


def kernel_layer(
    cell: str, input: Tensor, initial: Sequence[Tensor], weights: Weights
) -> tuple[Tensor, ...]:
    """`layer`, for arguments that are known to have passed ops.check_layer and `supported`."""
    if torch.is_grad_enabled():
        function: Any = _FUNCTIONS[cell]
        for t in (input, *initial, *weights):
            if t is not None and t.requires_grad:
                return function.apply(cell, input, *initial, *weights)  # type: ignore[no-any-return]
    return ops.forward(cell, input, initial, weights, save=False)[0]


def reference_layer(
    cell: str, input: Tensor, initial: Sequence[Tensor], weights: Weights
) -> tuple[Tensor, ...]:
    """`layer` in plain torch operations, for whatever the kernels do not take."""
    ops.count("reference")
    if input.dim() == 3:
        return reference.scan(cell, input, tuple(initial), weights)
    states = tuple(s.unsqueeze(0) for s in initial)
    return tuple(r.squeeze(0) for r in reference.scan(cell, input.unsqueeze(0), states, weights))


def _unpack(
    cell: str, tensors: Sequence[Any]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """(input, initial, weights) of a Function's tensors."""
    states = 2 if ops.CELLS[cell].has_cell_state else 1
    return tensors[0], tuple(tensors[1 : 1 + states]), tuple(tensors[1 + states :])


class _SequenceFunction(Function):
    """apply(cell, input, h0, [c0,] *weights) -> (output, h_n[, c_n]); arguments as kernel_layer's.

    The input projection is inside, not before it: so the pre-activations' memory is reused for the
    gates that backward needs, and double backward has everything it starts from.
    """

    @staticmethod
    def forward(ctx: Any, cell: str, *tensors: Tensor | None) -> Any:
        results, saved = ops.forward(cell, *_unpack(cell, tensors), save=True)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved.gates, saved.extra)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_autocast_enabled("cpu"):  # it is for forward passes
            with torch.autocast("cpu", enabled=False):
                return _SequenceFunction.backward(ctx, *grads)
        *tensors, gates, extra = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled() or ops.transformed() or not ops.ordinary(*given):
            return None, *_reference_backward(ctx.cell, tensors, grads, needed)
        saved = ops.Saved(gates, extra)
        return None, *_kernel_backward(ctx.cell, *_unpack(ctx.cell, tensors), saved, grads, needed)


# One name each, as autograd's graph and torch.profiler show them.
class LSTMFunction(_SequenceFunction):
    """apply("lstm", input, h0, c0, *weights) -> (output, h_n, c_n)."""


class GRUFunction(_SequenceFunction):
    """apply("gru", input, h0, *weights) -> (output, h_n)."""


class RNNFunction(_SequenceFunction):
    """apply("rnn_tanh" or "rnn_relu", input, h0, *weights) -> (output, h_n)."""


_FUNCTIONS: dict[str, type[_SequenceFunction]] = {
    "lstm": LSTMFunction,
    "gru": GRUFunction,
    "rnn_tanh": RNNFunction,
    "rnn_relu": RNNFunction,
}


def _kernel_backward(
    cell: str,
    input: Tensor,
    initial: tuple[Tensor, ...],
    weights: Sequence[Any],
    saved: ops.Saved,
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of input, initial states and weights: the kernel's, and a GEMM for h0."""
    spec = ops.CELLS[cell]
    _, batch, hidden, directions = ops.dimensions(input, initial)
    need_input, need_h0 = needed[0], needed[1]
    need_weights = needed[1 + len(initial) :]
    result = ops.backward(cell, input, initial, weights, saved, grads, need_input, need_weights)

    grad_h0 = None
    if need_h0:
        # The products first, then the (larger) carry: small terms added to a large sum one by one
        # lose more.
        grad_h0 = result.carry if cell == "gru" else torch.zeros_like(initial[0])
        assert grad_h0 is not None
        for d in range(directions):
            first_step = result.grad_gates[d, 0 if d == 0 else -1]
            grad_h0.view(directions, batch, hidden)[d] += sum(
                first_step[:, columns] @ weights[4 * d + 1][rows]
                for columns, rows in ops.recurrent_blocks(cell, hidden)
            )
    grad_states = [grad_h0]
    if spec.has_cell_state:
        grad_states.append(result.carry if needed[2] else None)
    return [result.input, *grad_states, *result.weights]


def _reference_backward(
    cell: str,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as differentiable functions of everything they depend on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor passed twice (h0 as c0, say) is two inputs here.
        inputs = [t if t is None else t.view_as(t) for t in tensors]
        if not differentiable:
            inputs = [
                t if t is None else t.detach().requires_grad_(n)
                for t, n in zip(inputs, needed, strict=True)
            ]
        results = reference_layer(cell, *_unpack(cell, inputs))
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
