"""The only caller of the compiled CPU kernels, and the counters that say what ran.

csrc/bindings.cpp checks what it is given, and refuses what the kernels cannot take; here is what
must be known before that, and the errors. CUDA tensors go on to cuda.py. Not an autograd layer:
functional.py is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    _are_functorch_transforms_active,
    _dispatch_tls_is_dispatch_key_included,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad, profiler

try:
    import fusedrnn._C as _C
except ImportError as error:
    _HERE = Path(__file__).resolve().parents[1]
    raise RuntimeError(
        f"fusedrnn's compiled extension fusedrnn._C cannot be loaded ({error}). "
        + (
            f"{_HERE} is fusedrnn's source, which Python finds before an installed package: start "
            "it in another folder after `pip install .`, or build here: `pip install -e .`"
            if (_HERE / "csrc").is_dir()
            else "Build it: `pip install .` in fusedrnn's source folder."
        )
    ) from error

log = logging.getLogger("fusedrnn")  # DEBUG: the choice of kernels, and what was left to others

# Calls since import, by what computed them: a kernel, the reference in plain torch operations, or
# torch.nn's own implementation. One layer is one call.
counts = {"kernel_forward": 0, "kernel_backward": 0, "reference": 0, "torch": 0}


def count(what: str) -> None:
    """Adds one to `counts[what]`."""
    counts[what] += 1


def isa() -> str:
    """The instruction set whose kernels run: "amx", "avx512_bf16", "avx512", "avx2", "neon_bf16" or
    "generic".

    The environment variable FUSEDRNN_ISA, read at import, overrides the choice.
    """
    return _ISA


# A forked child has none of its parent's threads, and OpenMP would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_C.release_threads)

# Whether the kernels multiply bfloat16 numbers by an instruction of their own; else in float32.
BF16_PRODUCTS = _C.has_precision("medium")
# And three of their products for one, of float32 numbers at precision "high" and of float16's.
SPLIT_PRODUCTS = _C.has_precision("high")

_ISA = _C.isa()  # at import: a FUSEDRNN_ISA that cannot be had is an error here, not at first use
log.debug("kernels: %s", _ISA)


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
    return _C.watched()


def only_autocast() -> bool:
    """Whether `watched`, and by autocast alone: the kernels convert as it would."""
    return _is_any_autocast_enabled() and not (transformed() or _traced())


def transformed() -> bool:
    """Whether a functorch transform or forward-mode AD is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def only_transformed() -> bool:
    """Whether functorch transforms are active, and nobody else is watching."""
    return _are_functorch_transforms_active() and not (
        forward_ad._current_level >= 0 or _is_any_autocast_enabled() or _traced()
    )


def _traced() -> bool:
    """Whether torch.jit.trace, a dispatch mode or one before dispatch (of make_fx) is active."""
    return bool(
        _get_tracing_state()
        or _len_torch_dispatch_stack()
        or _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)
    )


class Options(NamedTuple):
    """What a layer's call can have beyond padded sequences. csrc/sequence.h, Sequences, defines it.

    batch_sizes: int64 [T], positive and falling, as PackedSequence has them: then the input is
        [N, I], the rows of time 0, of time 1 and so on, N = batch_sizes.sum() and B =
        batch_sizes[0], and so is the output, [N, D*P]
    reset: bool [T, B], or [N] with batch_sizes: whether a boundary that no state crosses lies
        between a row's step and the one before it
    reset_to_initial: behind a boundary stand h0 and c0 again, not zeros
    cells: LSTM's c of every step, [T, B, D*H] or [N, D*H], is the last result
    recompute: save h, and LSTM's c, for backward, which then computes the gates again: 2 numbers a
        row and unit instead of 5 for LSTM, 1 instead of 4 for GRU. No difference for RNN.
    bf16: float32 numbers may be rounded to bfloat16 where they are multiplied, as autocast would;
        no difference on CUDA devices, and where the CPU has no instruction for it
    """

    batch_sizes: Tensor | None = None
    reset: Tensor | None = None
    reset_to_initial: bool = False
    cells: bool = False
    recompute: bool = False
    bf16: bool = False


def takes(
    cell: str, input: Tensor, initial: Tensors, weights: Weights, options: Options | None = None
) -> bool:
    """Whether the kernels take these tensors: ordinary dense ones of one device, the CPU or a CUDA
    one, and of one dtype, float32, float64, bfloat16 or float16, of the shapes of one layer or, on
    the CPU, of one step (`check_layer`).

    `initial` is (h0,) or (h0, c0) or, for zeros, ().
    """
    if input.is_cuda:
        return bool(_cuda().takes(cell, input, initial, weights, options))
    return _C.takes(CELLS[cell].number, input, initial, weights, options)


def _cuda() -> Any:
    from . import cuda  # which imports this file

    return cuda


def precision(bf16: bool = False) -> str:
    """What torch lets float32's products be, in set_float32_matmul_precision's words: "highest",
    "high" or "medium"; of a call with Options.bf16, "medium".
    """
    return "medium" if bf16 else _C.float32_precision()


class Plan(NamedTuple):
    """How `forward` would run a call."""

    threads: int  # in all
    row_shards: int  # of one direction: shares of the batch,
    unit_shards: int  # and of the hidden units
    packed: bool  # whether the weights are laid out anew for the call
    chunk: int  # steps whose input is projected at once
    # Of products: "medium" of numbers rounded to bfloat16, "high" of two bfloat16 parts of each
    precision: str


def plan(
    cell: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None = None,
    kept: bool = False,
) -> Plan | None:
    """How `forward` would run, or None if not `takes`. Computes nothing.

    kept: with what `pack` has laid out.
    """
    first = (CELLS[cell].number, torch.get_num_threads(), precision(), kept)
    made = _C.plan(*first, input, initial, weights, options)
    return None if made is None else Plan(*made)


def _recorded(cell: str, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as torch.profiler shows it, under a name like "fusedrnn::lstm_forward"."""

    def call(*args: Any) -> Any:
        with profiler.record_function(f"fusedrnn::{cell.partition('_')[0]}_{what}"):
            return function(*args)

    return call


def forward(
    cell: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    save: bool,
    options: Options | None = None,
    panels: Any = None,
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """One layer, or one step, through the kernel and outside autograd; None if not `takes`.

    panels: of `pack`, which are used where they are these weights'.

    Returns the results of functional.layer, and what `backward` needs if `save`: the gates [D, N,
    G*H], then LSTM's c or GRU's a_hn [D, N, H], then, with a projection, h [D, N, P], in one tensor
    of one dimension; N = T*B without batch_sizes. Of these only LSTM's c and h with `recompute`.
    """
    call = _C.forward
    if profiler._is_profiler_enabled:
        call = _recorded(cell, "forward", call)
    threads = torch.get_num_threads()
    result = call(
        CELLS[cell].number, save, threads, precision(), input, initial, weights, options, panels
    )
    if result is None or result is NotImplemented:
        if not (input.is_cuda and takes(cell, input, initial, weights, options)):
            return None
        call = _cuda().forward
        if profiler._is_profiler_enabled:
            call = _recorded(cell, "forward", call)
        result = call(cell, save, input, initial, weights, options)
    counts["kernel_forward"] += 1
    return result


def plain(
    cell: str,
    one_step: bool,
    batch_first: bool,
    sizes: tuple[int, int, int, int],
    parameters: dict[str, Any],
    names: Sequence[str],
    flat: Sequence[Tensor | None] | None,
    input: Any,
    hx: Any,
    panels: Callable[[int, Weights], Any] | None,
) -> tuple[Tensor, ...] | None:
    """What a module gives for (input, hx), in the plainest case: an input [T, B, I] (if `one_step`,
    [B, I]; if `batch_first`, [B, T, I], and the output likewise; or without B, and the states too),
    no gradients, no dropout, nobody `watched`, and every weight of `names` among the module's
    `parameters`. None for any other.

    sizes: I, H, the number of layers, and how many weights each direction has, from 2 (without
    biases) to 5 (with a projection). flat: the weights as the layers list them, None for a step.
    panels: of a layer's number and weights, asked for where they may be used.
    """
    results = _C.plain(
        CELLS[cell].number, one_step, batch_first, sizes, parameters, names, flat, input, hx, panels
    )
    if results is not None:
        counts["kernel_forward"] += sizes[2]
    return results


def pack(cell: str, weights: Weights, precision: str) -> Any:
    """One layer's weights laid out for calls of `forward` of a `precision`, or None if it would not
    take them.
    """
    weight_ih = weights[0]
    if weight_ih is None or weight_ih.dim() != 2:
        return None
    input = weight_ih.new_empty(1, 1, weight_ih.shape[1])
    return _C.pack(CELLS[cell].number, precision, input, weights)


def backward(
    cell: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    saved: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    options: Options | None = None,
    groups: int = 0,
    forward_precision: str | None = None,
) -> tuple[Tensor | None, ...] | None:
    """The gradients of (input, *initial, *weights) as far as `needed`, from what `forward` saved.

    grads: of each result, None for zero. forward_precision: what `precision` was in `forward`;
    None: as it is now. groups: 0, or N for a batch of N samples of B / N rows each, all of one
    length; those of the weights are then each sample's own, [N, ...]. Returns None if one of
    `grads` is no ordinary tensor.
    RuntimeError if another argument is not as `forward` took or gave it.
    """
    word = forward_precision or precision()
    first: tuple[Any, ...] = (CELLS[cell].number, torch.get_num_threads(), word)
    call: Callable[..., Any] = _C.backward
    if input.is_cuda:
        first, call = (cell,), _cuda().backward
    if profiler._is_profiler_enabled:
        call = _recorded(cell, "backward", call)
    result = call(*first, input, initial, weights, options, saved, grads, needed, groups)
    if result is None:  # what comes back may have passed a user's saved_tensors_hooks
        raise RuntimeError(
            "saved_tensors_hooks must give back tensors of the shape, dtype and device that they "
            f"were given: a {input.dtype} layer on {input.device} got something else"
        )
    if result is NotImplemented:
        return None
    counts["kernel_backward"] += 1
    return result  # type: ignore[no-any-return]


def weights_per_direction(weights: Sequence[Tensor | None]) -> int:
    """4, or 5 with a projection."""
    return 5 if weights and len(weights) % 5 == 0 else 4


def check_weights(cell: str, features: int, hidden: int, weights: Sequence[Tensor | None]) -> None:
    """RuntimeError unless the weights' shapes are those of one layer, [G*H, features] and so on."""
    rows = CELLS[cell].gates * hidden
    per_direction = weights_per_direction(weights)
    weight_hh = weights[1]
    size = hidden
    if per_direction == 5 and weight_hh is not None and weight_hh.dim() == 2:
        size = weight_hh.shape[1]
    expected = ((rows, features), (rows, size), (rows,), (rows,), (size, hidden))
    for i, weight in enumerate(weights):
        k = i % per_direction
        if (weight is None and k not in (2, 3)) or (
            weight is not None and weight.shape != expected[k]
        ):
            got = None if weight is None else list(weight.shape)
            raise RuntimeError(f"{_WEIGHTS[k]} must be {list(expected[k])}, got {got}")


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def check_layer(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    options: Options | None = None,
    values: bool = True,
) -> None:
    """RuntimeError unless the shapes are those of one layer, or of one step (input [B, I]).

    values: whether batch_sizes can be read; where not, h0 says what B is.
    """
    options = options or Options()
    per_direction = weights_per_direction(weights)
    directions, rest = divmod(len(weights), per_direction)
    if rest or directions not in (1, 2) or (per_direction == 5 and cell != "lstm"):
        raise RuntimeError(
            "Expected 4 weights (weight_ih, weight_hh, bias_ih, bias_hh), and weight_hr of an LSTM "
            f"with a projection, for each of 1 or 2 directions, got {len(weights)}"
        )
    if options.batch_sizes is not None:
        if input.dim() != 2:
            raise RuntimeError(f"input must be [N, I] with batch_sizes, got {list(input.shape)}")
        if values:
            batch = _check_batch_sizes(input, options.batch_sizes)
        else:
            batch = initial[0].shape[1] if initial and initial[0].dim() == 3 else 0
    elif input.dim() != 3 and not (input.dim() == 2 and directions == 1):
        raise RuntimeError(
            f"input must be [T, B, I], or [B, I] for one step, got {list(input.shape)}"
        )
    else:
        batch = input.shape[-2]
    one_step = input.dim() == 2 and options.batch_sizes is None
    if input.dim() == 3 and input.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if options.reset is not None and (
        options.reset.dtype is not torch.bool or options.reset.shape != input.shape[:-1] or one_step
    ):
        raise RuntimeError(
            f"reset must be bool {list(input.shape[:-1])}, and the input no single step, got "
            f"{options.reset.dtype} {list(options.reset.shape)}"
        )
    if options.cells and (cell != "lstm" or one_step):
        raise RuntimeError(f"cells are an LSTM layer's, not of {cell} or of one step")
    weight_hh = weights[1]
    gates = CELLS[cell].gates
    if weight_hh is None or weight_hh.dim() != 2 or weight_hh.shape[0] % gates:
        got = None if weight_hh is None else list(weight_hh.shape)
        raise RuntimeError(f"weight_hh must be [G*H, H], got {got}")
    hidden, size = weight_hh.shape[0] // gates, weight_hh.shape[1]
    if per_direction == 4:
        hidden = size
    if len(initial) not in (0, CELLS[cell].states):
        raise RuntimeError(f"Expected {CELLS[cell].states} initial states, got {len(initial)}")
    for name, tensor, width in zip(("h0", "c0"), initial, (size, hidden), strict=False):
        expected = (directions, batch, width)[one_step:]
        if tensor.shape != expected:
            raise RuntimeError(f"{name} must be {list(expected)}, got {list(tensor.shape)}")
    check_weights(cell, input.shape[-1], hidden, weights)


def _check_batch_sizes(input: Tensor, batch_sizes: Tensor) -> int:
    """B; RuntimeError unless batch_sizes is as Options says."""
    sizes = batch_sizes.tolist() if batch_sizes.dim() == 1 else []
    if (
        batch_sizes.dtype is not torch.int64
        or not sizes
        or sizes[-1] <= 0
        or sizes != sorted(sizes, reverse=True)
        or sum(sizes) != input.shape[0]
    ):
        raise RuntimeError(
            f"batch_sizes must be int64 [T], positive, falling, and {input.shape[0]} in all as the "
            f"input has rows, got {batch_sizes.dtype} {list(batch_sizes.shape)}, "
            f"{sum(sizes)} in all"
        )
    return int(sizes[0])
