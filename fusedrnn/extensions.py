"""What LSTM, GRU and RNN take that torch.nn's do not: lengths of a padded input, jagged nested
tensors, reset masks, and the cell states of every step.

Sequences of several lengths become rows sorted by time and by falling length, as in a
PackedSequence, which is how the kernels take them, and results go back the same way: in plain torch
operations, which autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled
from torch.compiler import is_compiling
from torch.nested import nested_tensor_from_jagged
from torch.nn.utils.rnn import PackedSequence

from . import ops

States = list[Tensor] | tuple[Tensor, ...]  # (h,) or, for LSTM, (h, c); or () for zeros


def is_jagged(input: Any) -> bool:
    """Whether the input is a jagged nested tensor."""
    return isinstance(input, Tensor) and input.layout is torch.jagged


def extended(
    layers: Any,
    kernels: Callable[..., Any],
    input: Any,
    states: States | None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset_mask: Tensor | None = None,
    reset_to_hx: bool = False,
    return_cell_states: bool = False,
) -> list[Tensor]:
    """[output, *final states, cells if wanted] of LSTM, GRU or RNN `layers`; see LSTM there.

    `kernels` is layers._kernels, as it is or for a graph.
    ValueError, TypeError or RuntimeError where an argument does not fit.
    """
    if lengths is None and type(input) is Tensor and input.dim() == 3:
        # The kernels check what they take. What they refuse is looked at below.
        options = ops.Options(None, _by_time(layers, reset_mask), reset_to_hx, return_cell_states)
        results = kernels(input, states or (), options)
        if results is not None:
            return results  # type: ignore[no-any-return]
    if isinstance(input, PackedSequence):
        raise ValueError(
            "lengths, reset_mask and return_cell_states take padded or jagged input, got a "
            "PackedSequence; pad it (torch.nn.utils.rnn.pad_packed_sequence) and give lengths"
        )
    if is_jagged(input):
        if lengths is not None or reset_mask is not None:
            raise ValueError(
                "lengths and reset_mask are of padded input, got a jagged nested tensor; pad it "
                "(torch.nested.to_padded_tensor)"
            )
        ragged, flat = from_jagged(input), input.values()
        _check_input(layers, flat)
        options = ops.Options(cells=return_cell_states)
        results = _ragged(layers, kernels, ragged, flat, states, input.shape[0], options)
        for i in _sequences(layers, results):
            results[i] = nested_tensor_from_jagged(results[i], input.offsets())
        return results

    if input.dim() not in (2, 3):
        raise ValueError(
            f"{type(layers).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        )
    unbatched = input.dim() == 2
    _check_input(layers, input)
    if reset_mask is not None:
        reset_mask = _checked_mask(reset_mask, input)
    if lengths is None:
        _check_states(layers, states, input, input.shape[0 if layers.batch_first else 1], unbatched)
        options = ops.Options(None, _by_time(layers, reset_mask), reset_to_hx, return_cell_states)
        return kernels(input, states or (), options, own=True)  # type: ignore[no-any-return]

    if isinstance(lengths, Tensor) and _get_tracing_state():
        raise RuntimeError(
            "torch.jit.trace would keep the values of lengths for all inputs; use torch.compile, "
            "or give a list of the lengths that it is to keep"
        )
    if unbatched:
        raise ValueError("lengths are of an input of three dimensions, got two; unsqueeze it")
    if input.shape[1 if layers.batch_first else 0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    seq_len, batch = input.shape[:2] if not layers.batch_first else input.shape[1::-1]
    ragged = from_lengths(lengths, seq_len, batch, layers.batch_first, input.device)
    if reset_mask is not None:
        reset_mask = ragged.gather(reset_mask.flatten())
    options = ops.Options(None, reset_mask, reset_to_hx, return_cell_states)
    results = _ragged(layers, kernels, ragged, input.flatten(0, 1), states, batch, options)
    for i in _sequences(layers, results):
        results[i] = results[i].reshape(*input.shape[:2], results[i].shape[1])
    return results


def _by_time(layers: Any, mask: Tensor | None) -> Tensor | None:
    """A mask [T, B] of one that is as the input: also [B, T] or [T]. Checks nothing."""
    if not isinstance(mask, Tensor) or mask.dim() not in (1, 2):
        return mask
    return mask.unsqueeze(1) if mask.dim() == 1 else mask.t() if layers.batch_first else mask


def _sequences(layers: Any, results: Sequence[Tensor]) -> list[int]:
    """Which results are one for every step: the output and the cells."""
    return [0, *range(1 + layers._num_states, len(results))]


def _ragged(
    layers: Any,
    kernels: Callable[..., Any],
    ragged: Ragged,
    flat: Tensor,
    states: States | None,
    batch: int,
    options: ops.Options,
) -> list[Tensor]:
    """`extended` for flat input [rows, I]; output and cells are flat too."""
    _check_states(layers, states, flat, batch, False)
    if states is None:
        states = zero_states(layers, flat, batch)
    order = ragged.order
    started = [s.index_select(1, order) for s in states]
    if is_compiling() or len(order):  # unknown in a graph, whose operators take none too
        options = options._replace(batch_sizes=ragged.batch_sizes)
        results = kernels(ragged.gather(flat), started, options, own=True)
    else:  # all are empty: one step of a batch of none, for its shapes, dtypes and gradients
        step = flat[:0].unsqueeze(1 if layers.batch_first else 0)
        results = kernels(step, started, options._replace(reset=None), own=True)
        for i in _sequences(layers, results):
            results[i] = results[i].flatten(0, 1)
    for i, state in enumerate(states, 1):
        results[i] = state.to(results[i].dtype).index_copy(1, order, results[i])
    for i in _sequences(layers, results):
        results[i] = ragged.scatter(results[i], flat)
    return results  # type: ignore[no-any-return]


def zero_states(layers: Any, like: Tensor, batch: int) -> States:
    """The initial states of `batch` sequences where none are given."""
    first = layers.num_layers * (1 + layers.bidirectional)
    return [like.new_zeros(first, batch, size) for size in _state_sizes(layers)]


def _state_sizes(layers: Any) -> tuple[int, ...]:
    return (layers.proj_size or layers.hidden_size, layers.hidden_size)[: layers._num_states]


def _check_input(layers: Any, input: Tensor) -> None:
    """torch's error unless the features are as many as they must be, and of the weights' dtype."""
    if input.shape[-1] != layers.input_size or input.dtype != layers._flat_weights[0].dtype:
        layers.check_input(input.unsqueeze(1) if input.dim() == 2 else input, None)


def _check_states(
    layers: Any, states: States | None, input: Tensor, batch: int, unbatched: bool
) -> None:
    """RuntimeError unless the states are those of so many sequences, and as the input."""
    first = layers.num_layers * (1 + layers.bidirectional)
    for i, (state, size) in enumerate(zip(states or (), _state_sizes(layers), strict=False)):
        expected = (first, size) if unbatched else (first, batch, size)
        if not isinstance(state, Tensor) or state.shape != expected:
            got = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {got}")
        if state.dtype != input.dtype and not _is_any_autocast_enabled():
            raise RuntimeError(
                f"input and hx must be of one dtype, got {input.dtype} and {state.dtype}. Convert "
                "with .to(dtype)."
            )


def _checked_mask(given: Any, input: Tensor) -> Tensor:
    """The mask as a tensor.

    ValueError unless it is bool, of the shape of all but the input's last dimension, and on its
    device.
    """
    mask: Tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    expected = input.shape[:-1]
    if mask.dtype is not torch.bool or mask.shape != expected or mask.device != input.device:
        raise ValueError(
            f"reset_mask must be torch.bool {list(expected)} on {input.device}, the input's shape "
            f"without its features, got {mask.dtype} {list(mask.shape)} on {mask.device}; convert "
            "with .bool(), transpose with .t(), move with .to(device)"
        )
    return mask


class Ragged(NamedTuple):
    """Where the rows of some sequences are.

    rows: int64 [N], the rows of the flattened input in the kernels' order, on its device
    batch_sizes: int64 [T] as a PackedSequence's, on the CPU; empty if every sequence is
    order: int64, the sequences that are not empty, by falling length, on the input's device
    """

    rows: Tensor
    batch_sizes: Tensor
    order: Tensor

    def gather(self, flat: Tensor) -> Tensor:
        """The kernels' rows [N, ...] of an array [rows of the input, ...]."""
        return flat.index_select(0, self.rows)

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """The reverse of `gather`: zeros where no sequence is."""
        empty = rows.new_zeros(like.shape[0], *rows.shape[1:])
        return empty.index_copy(0, self.rows, rows)


_CPU = torch.device("cpu")


def rows_of(
    lengths: Tensor, first: Tensor, stride: int, seq_len: int, device: torch.device = _CPU
) -> Ragged:
    """Of sequences whose t-th row is first + t * stride; lengths and first: CPU, int64 [B].

    ValueError unless the lengths are from 0 to seq_len. In a graph one operator: see library.py.
    """
    if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > seq_len):
        raise ValueError(
            f"lengths must be from 0 to {seq_len}, the input's time steps, got "
            f"{int(lengths.min())} to {int(lengths.max())}; pad the input or clamp the lengths"
        )
    ordered, order = lengths.sort(descending=True, stable=True)
    order = order[: int((ordered > 0).sum())]
    ordered = ordered[: len(order)]
    times = torch.arange(int(ordered[0]) if len(order) else 0, device="cpu").unsqueeze(1)
    runs = times < ordered  # [T, sequences]
    rows = (first[order] + times * stride)[runs]
    return Ragged(rows.to(device), runs.sum(1), order.to(device))


def from_lengths(
    lengths: Tensor | Sequence[int],
    seq_len: int,
    batch: int,
    batch_first: bool,
    device: torch.device,
) -> Ragged:
    """Of padded input [seq_len, batch], or [batch, seq_len] with batch_first, flattened.

    TypeError unless lengths are integers, ValueError unless they are `batch` from 0 to seq_len.
    """
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.numel() and (
        lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool
    ):
        raise TypeError(f"lengths must be integers, got {lengths.dtype}; convert with .long()")
    lengths = lengths.long()
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must be [{batch}], one for each sequence of the batch, got "
            f"{list(lengths.shape)}"
        )
    sequences = torch.arange(batch, device="cpu")
    first = sequences * seq_len if batch_first else sequences
    arguments = (lengths, first, 1 if batch_first else batch, seq_len)
    return _in_graph(*arguments) if is_compiling() else rows_of(*arguments, device)


def _in_graph(*arguments: Any) -> Ragged:
    """rows_of(*arguments), while torch.compile builds a graph."""
    return Ragged(*torch.ops.fusedrnn.ragged(*arguments))


def from_jagged(nested: Tensor) -> Ragged:
    """Of a jagged nested tensor [B, *, I]'s values.

    ValueError if another dimension is the ragged one, or if it has holes.
    """
    if nested.dim() != 3 or nested._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "a jagged input must be [B, *, I], ragged in dimension 1, got "
            f"{nested.dim()} dimensions, ragged in {nested._ragged_idx}; "  # type: ignore[attr-defined]
            "transpose it before"
        )
    if nested.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError("a jagged input must have no holes; call .contiguous() before")
    offsets = nested.offsets().cpu().long()  # type: ignore[attr-defined]
    arguments = (offsets.diff(), offsets[:-1], 1, nested.values().shape[0])
    return _in_graph(*arguments) if is_compiling() else rows_of(*arguments, nested.device)
