"""Weights that stay laid out as the kernels read them, for inference in many short calls.

A call lays its weights out anew, because they may change in ways that nothing shows. `prepacked`
is the promise that they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import ops
from .functional import autocast_is_bf16

if TYPE_CHECKING:
    from ._C import Panels


class _Kept(NamedTuple):
    """One layer's weights, their versions, and their layout."""

    weights: tuple[Tensor | None, ...]
    memory: list[Tensor]  # theirs, held so that nothing else comes to lie there
    versions: list[int]
    panels: Panels | None


_kept: WeakKeyDictionary[nn.Module, dict[int, _Kept]] = WeakKeyDictionary()
active = 0  # contexts: modules look here first


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, calls of `model` under no_grad read weights that are laid out once, not in each call.

    For inference in many short calls: a cell or one time step at a time, beams, streams, small
    sequences. `model` is one of fusedrnn's modules or holds some; each of its layers is laid out at
    its first call, which takes as much memory again as its weights. Results may differ by roundings
    from those outside, where a short call reads the weights as they are.

    Weights that torch counts as changed (optimizer steps, load_state_dict, in-place operations) or
    that are other tensors than before are laid out anew; those that have moved (`.data = ...`) are
    read as outside. Changes that nothing shows are not seen: do not write to a weight through
    `.data`, numpy or another process inside.

    Calls with gradients enabled, compiled ones and those on other devices go on as outside. Raises
    ValueError if `model` has none of fusedrnn's modules.
    """
    global active
    from .modules import _Fused  # which imports this file

    modules = [m for m in model.modules() if isinstance(m, _Fused)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no LSTM, GRU or RNN of fusedrnn's, nor one of their "
            "cells: call fusedrnn.replace(model) first"
        )
    new = [m for m in modules if m not in _kept]  # a context outside may have the others
    _kept.update((m, {}) for m in new)
    active += 1
    try:
        yield
    finally:
        active -= 1
        for module in new:
            del _kept[module]


def panels(module: nn.Module, layer: int, cell: str, weights: ops.Weights) -> Panels | None:
    """The layout of one layer's weights; None outside `prepacked`, or where there is none."""
    layers = None if torch.is_grad_enabled() else _kept.get(module)
    if layers is None:
        return None
    try:
        versions = [w._version for w in weights if w is not None]
    except RuntimeError:  # tensors made in inference mode have none
        return None
    kept = layers.get(layer)
    if kept is None or kept.versions != versions or not all(map(is_, kept.weights, weights)):
        memory = [w.detach() for w in weights if w is not None]
        packed = ops.pack(cell, weights, bf16=autocast_is_bf16())
        kept = _Kept(tuple(weights), memory, versions, packed)
        layers[layer] = kept
    return kept.panels
