"""The only caller of the compiled kernels, and the counters that say what ran.

csrc/bindings.cpp checks what it is given, and refuses what the kernels cannot take; here is what
must be known before that, and the errors. Not an autograd layer: functional.py is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad

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


# A forked child has none of its parent's threads, and OpenMP would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_C.release_threads)

_ISA = _C.isa()  # at import: a FUSEDRNN_ISA that cannot be had is an error here, not at first use


class Cell(NamedTuple):
    """What the host side must know of a cell; csrc/cells/ has the rest."""

    number: int  # in csrc/sequence.h's enum Cell
    gates: int  # row blocks of weight_ih and weight_hh
    states: int  # h, or h and c
    extra: int  # what `forward` saves beside the gates: 1 for LSTM's c and GRU's a_hn


CELLS = {
    "lstm": Cell(0, 4, 2, 1),
    "gru": Cell(1, 3, 1, 1),
    "rnn_tanh": Cell(2, 1, 1, 0),
    "rnn_relu": Cell(3, 1, 1, 0),
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # that the kernels take

Tensors = list[Tensor] | tuple[Tensor, ...]
Weights = list[Tensor] | list[Tensor | None] | tuple[Tensor | None, ...]


def watched() -> bool:
    """Whether somebody transforms, rewrites or records torch's operations here and now.

    functorch, forward-mode AD, autocast, torch.jit.trace and dispatch modes do. What the kernels
    do inside would be missed.
    """
    return bool(
        transformed()
        or _is_any_autocast_enabled()
        or _get_tracing_state()
        or _len_torch_dispatch_stack()
    )


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def only_transformed() -> bool:
    """Whether functorch transforms are active, and nobody else is watching."""
    return _are_functorch_transforms_active() and not (
        forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _get_tracing_state()
        or _len_torch_dispatch_stack()
    )


def takes(cell: str, input: Tensor, initial: Tensors, weights: Weights) -> bool:
    """Whether the kernels take these tensors: ordinary dense CPU tensors of one dtype, float32,
    float64, bfloat16 or float16, of the shapes of one layer, or of one step (`check_layer`).

    `initial` is (h0,) or (h0, c0) or, for zeros, ().
    """
    return _C.takes(CELLS[cell].number, input, initial, weights)


class Plan(NamedTuple):
    """How `forward` would run a call."""

    threads: int  # in all
    row_shards: int  # of one direction: shares of the batch,
    unit_shards: int  # and of the hidden units
    packed: bool  # whether the weights are laid out anew for the call
    chunk: int  # steps whose input is projected at once


def plan(cell: str, input: Tensor, initial: Tensors, weights: Weights) -> Plan | None:
    """How `forward` would run, or None if not `takes`. Computes nothing."""
    made = _C.plan(CELLS[cell].number, torch.get_num_threads(), input, initial, weights)
    return None if made is None else Plan(*made)


def forward(
    cell: str, input: Tensor, initial: Tensors, weights: Weights, save: bool
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """One layer, or one step, through the kernel and outside autograd; None if not `takes`.

    Returns the results of functional.layer, and what `backward` needs if `save`: the gates [D, T,
    B, G*H], then LSTM's c or GRU's a_hn [D, T, B, H], in one tensor of one dimension.
    """
    result = _C.forward(CELLS[cell].number, save, torch.get_num_threads(), input, initial, weights)
    if result is None or result is NotImplemented:
        return None
    counts["kernel_forward"] += 1
    return result


def backward(
    cell: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    saved: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    groups: int = 0,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of (input, *initial, *weights) as far as `needed`, from what `forward` saved.

    grads: of each result, None for zero. groups: 0, or N for a batch of N samples of B / N rows
    each; those of the weights are then each sample's own, [N, ...]. Returns None if one of `grads`
    is no ordinary tensor.
    RuntimeError if another argument is not as `forward` took or gave it.
    """
    result = _C.backward(
        CELLS[cell].number,
        torch.get_num_threads(),
        input,
        initial,
        weights,
        saved,
        grads,
        needed,
        groups,
    )
    if result is None:  # what comes back may have passed a user's saved_tensors_hooks
        raise RuntimeError(
            "saved_tensors_hooks must give back tensors of the shape, dtype and device that they "
            f"were given: a {input.dtype} layer on the CPU got something else"
        )
    if result is NotImplemented:
        return None
    counts["kernel_backward"] += 1
    return result


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
    if len(initial) not in (0, CELLS[cell].states):
        raise RuntimeError(f"Expected {CELLS[cell].states} initial states, got {len(initial)}")
    for name, tensor in zip(("h0", "c0"), initial, strict=False):
        if tensor.shape != expected_state:
            raise RuntimeError(f"{name} must be {list(expected_state)}, got {list(tensor.shape)}")
    check_weights(cell, features, hidden, weights)
