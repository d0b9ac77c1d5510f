"""Weights that stay laid out as the kernels read them, for inference in many short calls.

A call lays its weights out anew, because they may change in ways that nothing shows. `prepacked`
is the promise that they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import is_
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops
from .functional import autocast_is_bf16

if TYPE_CHECKING:
    from ._C import Panels


class _Kept(NamedTuple):
    """One layer's weights and, from the second call with them on, their layout."""

    weights: tuple[Tensor | None, ...]
    memory: list[Tensor]  # theirs, held so that nothing else comes to lie there
    versions: list[int]
    seen_before: bool
    panels: Panels | None


@dataclass
class _Module:
    contexts: int = 0
    layers: dict[tuple[int, str], _Kept] = field(default_factory=dict)  # by number, precision


_modules: dict[int, _Module] = {}  # by id: the contexts hold the modules
_lock = Lock()  # of _modules' keys and `contexts`
active = 0  # contexts: modules look here first


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, calls of `model` under no_grad read weights that are laid out once, not in each call.

    For inference in many short calls (decoding, beams, streams). It pays for float16 always, else
    from about 4 rows at a hidden size of 128 and one row at 512 on; the steps of one row of a small
    cell take up to 1.4 times as long. `model` is one of fusedrnn's modules or holds some; each of
    its layers is laid out at its second call with the same weights, which takes as much memory
    again as they do. Short calls read weights as they are outside, and results differ by roundings;
    of float32 weights at reduced precision (autocast, torch.set_float32_matmul_precision) their
    products are less precise inside and float32's outside.

    Weights that torch counts as changed (in-place operations, load_state_dict), that are other
    tensors than before, or that a step of an optimizer may have changed, are laid out anew; those
    that have moved (`.data = ...`) are read as outside. Changes that nothing shows are not seen: do
    not write to a weight through `.data`, numpy or another process inside.

    Calls with gradients enabled, compiled ones and those on other devices go on as outside. Raises
    ValueError if `model` has none of fusedrnn's modules, TypeError if it is no torch.nn.Module.
    """
    global active
    from .modules import _Fused  # which imports this file

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = [m for m in model.modules() if isinstance(m, _Fused)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no LSTM, GRU or RNN of fusedrnn's, nor one of their "
            "cells: call fusedrnn.replace(model) first"
        )
    # Fused optimizers change weights without counting.
    hook = register_optimizer_step_post_hook(_forget)
    with _lock:
        active += 1
        for module in modules:
            _modules.setdefault(id(module), _Module()).contexts += 1
    try:
        yield
    finally:
        hook.remove()
        with _lock:
            active -= 1
            for module in modules:
                _modules[id(module)].contexts -= 1
                if not _modules[id(module)].contexts:
                    del _modules[id(module)]


def _forget(*arguments: Any) -> None:
    with _lock:
        for module in _modules.values():
            module.layers.clear()


def keeps(module: nn.Module) -> bool:
    """Whether calls of the module now are inside `prepacked`, without gradients."""
    return id(module) in _modules and not torch.is_grad_enabled()


def panels(module: nn.Module, cell: str, layer: int, weights: ops.Weights) -> Panels | None:
    """The layout of one layer's weights; None outside `prepacked`, or where there is none yet."""
    kept_module = None if torch.is_grad_enabled() else _modules.get(id(module))
    if kept_module is None:
        return None
    try:
        versions = [w._version for w in weights if w is not None]
    except RuntimeError:  # tensors made in inference mode have none
        return None
    precision = ops.precision(autocast_is_bf16())
    kept = kept_module.layers.get((layer, precision))
    same = kept is not None and kept.versions == versions and all(map(is_, kept.weights, weights))
    if kept is not None and same and kept.seen_before:
        return kept.panels
    # Not at the first call: parametrized weights are other ones each time.
    memory = [w.detach() for w in weights if w is not None]
    packed = ops.pack(cell, weights, precision) if same else None
    kept_module.layers[layer, precision] = _Kept(tuple(weights), memory, versions, same, packed)
    return packed
