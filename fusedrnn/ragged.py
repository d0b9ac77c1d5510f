"""Sequences of several lengths, as users have them and as the kernels take them.

Padded input with lengths, and jagged nested tensors, become rows sorted by time and by falling
length, as in a PackedSequence, and results go back the same way. Plain torch operations, which
autograd knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Where the rows of some sequences are.

    rows: int64 [N], the rows of the flattened input in the kernels' order
    batch_sizes: int64 [T] as a PackedSequence's; empty if every sequence is
    order: int64, the sequences that are not empty, by falling length
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


def _ragged(lengths: Tensor, first: Tensor, stride: int) -> Ragged:
    """Of sequences whose t-th row is first + t * stride; lengths and first int64 [B]."""
    ordered, order = lengths.sort(descending=True, stable=True)
    order = order[: int((ordered > 0).sum())]
    ordered = ordered[: len(order)]
    times = torch.arange(int(ordered[0]) if len(order) else 0).unsqueeze(1)
    runs = times < ordered  # [T, sequences]
    rows = (first[order] + times * stride)[runs]
    return Ragged(rows, runs.sum(1), order)


def from_lengths(
    lengths: Tensor | Sequence[int], seq_len: int, batch: int, batch_first: bool
) -> Ragged:
    """Of padded input [seq_len, batch], or [batch, seq_len] with batch_first, flattened.

    TypeError unless lengths are integers, ValueError unless they are `batch` from 0 to seq_len.
    """
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype is torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}; convert with .long()")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must be [{batch}], one for each sequence of the batch, got "
            f"{list(lengths.shape)}"
        )
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > seq_len):
        raise ValueError(
            f"lengths must be from 0 to {seq_len}, the input's time steps, got "
            f"{int(lengths.min())} to {int(lengths.max())}; pad the input or clamp the lengths"
        )
    sequences = torch.arange(batch)
    first = sequences * seq_len if batch_first else sequences
    return _ragged(lengths.long(), first, 1 if batch_first else batch)


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
    offsets = nested.offsets().cpu()  # type: ignore[attr-defined]
    return _ragged(offsets.diff(), offsets[:-1], 1)
