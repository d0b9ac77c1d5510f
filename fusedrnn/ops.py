"""The only caller of the compiled kernels: checks, allocation, and the counters that say what ran.

csrc/sequence.h is the contract that this file keeps. Not an autograd layer: functional.py is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _has_storage,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.nn.functional import linear

try:
    import fusedrnn._C as _C
except ImportError as error:
    raise RuntimeError(
        "fusedrnn's compiled extension fusedrnn._C cannot be loaded "
        f"({error}). Build it: `pip install .` in fusedrnn's source folder."
    ) from error

# Calls since import, by what computed them: a kernel, the reference in plain torch operations, or
# torch.nn's own implementation. One layer is one call.
counts = {"kernel_forward": 0, "kernel_backward": 0, "reference": 0, "torch": 0}


def count(what: str) -> None:
    """Adds one to `counts[what]`."""
    counts[what] += 1


def isa() -> str:
    """The instruction set whose kernels run: "avx512", "avx2" or "generic".

    The environment variable FUSEDRNN_ISA, read at import, overrides the choice.
    """
    return _ISA


_ISA = _C.isa()  # at import: a FUSEDRNN_ISA that cannot be had is an error here, not at first use


@dataclass(frozen=True)
class Cell:
    """What the host side must know of a cell; csrc/cells/ has the rest."""

    index: int  # in csrc/sequence.h's enum Cell
    gates: int  # row blocks of weight_ih and weight_hh
    grad_gates: int  # column blocks of grad_gates
    has_cell_state: bool
    has_extra: bool
    has_carry: bool
    # (block of grad_gates, row block of weight_hh, number of blocks): what belongs together in the
    # recurrent weight's gradient. GRU's grad_gates are n_h, r, z, n_x.
    recurrent_blocks: tuple[tuple[int, int, int], ...]


CELLS = {
    "lstm": Cell(0, 4, 4, True, True, True, ((0, 0, 4),)),
    "gru": Cell(1, 3, 4, False, True, True, ((1, 0, 2), (0, 2, 1))),
    "rnn_tanh": Cell(2, 1, 1, False, False, False, ((0, 0, 1),)),
    "rnn_relu": Cell(3, 1, 1, False, False, False, ((0, 0, 1),)),
}

_FORWARD = {torch.float32: _C.forward_f32, torch.float64: _C.forward_f64}
_BACKWARD = {torch.float32: _C.backward_f32, torch.float64: _C.backward_f64}
_PLAIN = (Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_NO_WEIGHTS = [0] * 8


def supported(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors as they are, here and now.

    They do when all are ordinary dense CPU tensors of one dtype, float32 or float64, and nobody
    transforms, rewrites or records torch's operations (functorch, forward-mode AD, autocast,
    torch.jit.trace, dispatch modes): what the kernels do inside would be missed.
    """
    return not (
        transformed()
        or _is_any_autocast_enabled()
        or _get_tracing_state()
        or _len_torch_dispatch_stack()
    ) and ordinary(input, *tensors)


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def ordinary(first: Tensor, *tensors: Tensor | None) -> bool:
    """Whether all are dense CPU tensors with memory of their own, of one dtype of the kernels'."""
    dtype = first.dtype
    if dtype not in _FORWARD:
        return False
    for t in (first, *tensors):
        if t is not None and not (
            type(t) in _PLAIN
            and t.dtype is dtype
            and t.is_cpu
            and t.layout is _STRIDED
            and not t.is_neg()
            and _has_storage(t)  # what vmap passes has none
        ):
            return False
    return True


def check_weights(cell: str, features: int, hidden: int, weights: Sequence[Tensor | None]) -> None:
    """RuntimeError unless the weights' shapes are those of one layer, [G*H, features] and so on."""
    rows = CELLS[cell].gates * hidden
    expected = ((rows, features), (rows, hidden), (rows,), (rows,))
    for i, weight in enumerate(weights):
        if (weight is None and i % 4 < 2) or (
            weight is not None and weight.shape != expected[i % 4]
        ):
            got = None if weight is None else list(weight.shape)
            raise RuntimeError(f"{_WEIGHTS[i % 4]} must be {list(expected[i % 4])}, got {got}")


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def check_layer(
    cell: str, input: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> None:
    """RuntimeError unless the shapes are those of one layer, or of one step (input [B, I])."""
    directions, rest = divmod(len(weights), 4)
    if rest or directions not in (1, 2):
        raise RuntimeError(
            "Expected 4 weights (weight_ih, weight_hh, bias_ih, bias_hh) for each of 1 or 2 "
            f"directions, got {len(weights)}"
        )
    if input.dim() != 3 and not (input.dim() == 2 and directions == 1):
        raise RuntimeError(
            f"input must be [T, B, I], or [B, I] for one step, got {list(input.shape)}"
        )
    if input.dim() == 3 and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    weight_hh = weights[1]
    if weight_hh is None or weight_hh.dim() != 2:
        got = None if weight_hh is None else list(weight_hh.shape)
        raise RuntimeError(f"weight_hh must be [G*H, H], got {got}")
    batch, features = input.shape[-2:]
    hidden = weight_hh.shape[1]
    expected_state = (directions, batch, hidden)[3 - input.dim() :]
    for name, tensor in zip(("h0", "c0"), initial, strict=False):
        if tensor.shape != expected_state:
            raise RuntimeError(f"{name} must be {list(expected_state)}, got {list(tensor.shape)}")
    check_weights(cell, features, hidden, weights)


def dimensions(input: Tensor, initial: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """(T, B, H, D) of a layer, or of one step: input [B, I] and states [B, H]."""
    batch, hidden = initial[0].shape[-2:]
    return (
        (input.shape[0], batch, hidden, initial[0].shape[0])
        if input.dim() == 3
        else (1, batch, hidden, 1)
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _linear(
    rows: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """rows[d] weights[d]^T + biases[d] for each direction d, one after the other in memory."""
    if len(weights) == 1:
        return linear(rows[0], weights[0], biases[0])
    out = rows[0].new_empty(len(weights), rows[0].shape[0], weights[0].shape[0])
    for out_d, rows_d, weight, bias in zip(out, rows, weights, biases, strict=True):
        if bias is None:
            torch.mm(rows_d, weight.t(), out=out_d)
        else:
            torch.addmm(bias, rows_d, weight.t(), out=out_d)
    return out


@dataclass
class Saved:
    """What the forward kernel leaves for the backward one; csrc/sequence.h says what is in them."""

    gates: Tensor | None  # [D, T, B, G*H] in memory; None if nothing is saved
    extra: Tensor | None  # [D, T, B, H]


def forward(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Any],
    save: bool,
) -> tuple[tuple[Tensor, ...], Saved]:
    """One layer, or one step, through the kernel and outside autograd.

    The arguments are as `supported` and `check_layer` want them. Returns (output, h_n) or, for
    LSTM, (output, h_n, c_n), and what `backward` needs if `save`.
    """
    counts["kernel_forward"] += 1
    spec = CELLS[cell]
    steps, batch, hidden, directions = dimensions(input, initial)
    initial = [s.contiguous() for s in initial]
    h0 = initial[0]

    gates: Tensor | None
    if steps == 1:
        # Two products, torch's business: the kernel would have to lay out the weights anew for
        # them.
        rows = input.flatten(0, 1) if input.dim() == 3 else input
        h0_rows = [*h0] if h0.dim() == 3 else [h0]
        gates = _linear([rows] * directions, weights[::4], weights[2::4])
        gates_h = _linear(h0_rows, weights[1::4], weights[3::4])
        input_address, addresses = 0, _NO_WEIGHTS
        stride_t = stride_b = 0
    else:
        if input.stride(2) != 1:
            input = input.contiguous()
        gates = h0.new_empty(directions, steps, batch, spec.gates * hidden) if save else None
        gates_h = None
        dense = [None if w is None else w.contiguous() for w in weights]  # live until the call ends
        addresses = [*map(_address, dense), *_NO_WEIGHTS[len(dense) :]]
        input_address = input.data_ptr()
        stride_t, stride_b, _ = input.stride()
    extra = h0.new_empty(directions, steps, batch, hidden) if save and spec.has_extra else None
    shape = (steps, batch, directions * hidden)
    output = h0.new_empty(shape[3 - input.dim() :])
    finals = [torch.empty_like(s) for s in initial]
    _FORWARD[input.dtype](
        spec.index,
        steps,
        batch,
        input.shape[-1],
        hidden,
        directions,
        torch.get_num_threads(),
        save,
        input_address,
        stride_t,
        stride_b,
        addresses,
        _address(gates_h),
        _address(gates),
        _address(extra),
        h0.data_ptr(),
        initial[1].data_ptr() if spec.has_cell_state else 0,
        output.data_ptr(),
        finals[0].data_ptr(),
        finals[1].data_ptr() if spec.has_cell_state else 0,
    )
    return (output, *finals), Saved(gates if save else None, extra)


@dataclass
class LayerGrads:
    """What the backward kernel computes; functional.py adds the gradient of h0."""

    grad_gates: Tensor  # [D, T, B, E*H]
    input: Tensor | None  # as the input
    carry: Tensor | None  # as h0: LSTM grad_c0; GRU what grad_h0 owes to h0 directly
    weights: list[Tensor | None]  # as the weights, None where not wanted


def backward(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Any],
    saved: Saved,
    grads: Sequence[Tensor | None],
    want_input: bool,
    wanted: Sequence[bool],
) -> LayerGrads:
    """The backward recurrence of one layer or step, from what `forward` saved.

    grads: of output, h_n and, for LSTM, c_n, None for zero. want_input: whether the input's
    gradient is wanted; wanted: which of the weights'.
    """
    spec = CELLS[cell]
    steps, batch, hidden, directions = dimensions(input, initial)
    gates, extra = saved.gates, saved.extra
    # What comes back may have passed a user's saved_tensors_hooks.
    if (
        gates is None
        or gates.numel() != directions * steps * batch * spec.gates * hidden
        or (extra is not None and extra.numel() != directions * steps * batch * hidden)
        or not ordinary(input, gates, extra, *initial, *weights)
    ):
        raise RuntimeError(
            "saved_tensors_hooks must give back tensors of the shape, dtype and device that they "
            f"were given: a {input.dtype} layer on the CPU got something else"
        )
    counts["kernel_backward"] += 1
    gates, extra = gates.contiguous(), None if extra is None else extra.contiguous()
    input = input.contiguous()
    initial = [s.contiguous() for s in initial]
    h0 = initial[0]
    dense = [None if w is None else w.contiguous() for w in weights]  # live until the call ends
    grad_output, grad_h_n, *grad_c_n = (None if g is None else g.contiguous() for g in grads)
    carry = None
    if grad_c_n and grad_c_n[0] is not None:
        # A copy: the kernel works in place, and the caller's gradient is not ours.
        carry = grad_c_n[0].clone()
    elif spec.has_carry:
        carry = torch.zeros_like(h0)
    grad_gates = h0.new_empty(directions, steps, batch, spec.grad_gates * hidden)

    grad_input = input.new_empty(directions, *input.shape) if want_input else None
    # One tensor each, also where two are equal (LSTM's biases): autograd may keep them as .grad.
    grad_weights = [
        h0.new_empty(w.shape) if want else None for w, want in zip(weights, wanted, strict=True)
    ]
    _BACKWARD[input.dtype](
        spec.index,
        steps,
        batch,
        input.shape[-1],
        hidden,
        directions,
        torch.get_num_threads(),
        gates.data_ptr(),
        _address(extra),
        input.data_ptr(),
        [*map(_address, dense), *_NO_WEIGHTS[len(dense) :]],
        h0.data_ptr(),
        initial[1].data_ptr() if spec.has_cell_state else 0,
        _address(grad_output),
        _address(grad_h_n),
        _address(carry),
        grad_gates.data_ptr(),
        _address(grad_input),
        [*map(_address, grad_weights), *_NO_WEIGHTS[len(grad_weights) :]],
    )
    if grad_input is not None:
        grad_input = grad_input[0] if directions == 1 else grad_input.sum(0)
    return LayerGrads(grad_gates, grad_input, carry, grad_weights)


def recurrent_blocks(cell: str, hidden: int) -> list[tuple[slice, slice]]:
    """Columns of grad_gates, and the rows of weight_hh that they belong to."""
    return [
        (slice(e * hidden, (e + n) * hidden), slice(g * hidden, (g + n) * hidden))
        for e, g, n in CELLS[cell].recurrent_blocks
    ]
