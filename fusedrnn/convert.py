"""replace(model) and restore(model): an existing model from torch.nn to fusedrnn and back.

Only a module's class changes, in place. So the module stays the same object, wherever it is
registered or held, with its parameters, buffers, hooks, parametrizations, mode and attributes, and
an optimizer made before goes on working. Nothing is patched in torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import modules, patching

_TO_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    cls._torch_class: cls
    for cls in (
        modules.LSTM,
        modules.GRU,
        modules.RNN,
        modules.LSTMCell,
        modules.GRUCell,
        modules.RNNCell,
    )
}
_TO_TORCH = {fused: original for original, fused in _TO_FUSED.items()}
for _made in patching.CLASSES[:3]:  # torch.nn's for isinstance, and fusedrnn's
    _TO_TORCH[_made] = _made._torch_class
    _TO_FUSED[_made] = _TO_FUSED[_made._torch_class]


@dataclass(repr=False)
class Report:
    """What replace or restore did; str() and repr() are readable.

    replaced: (name, old type, new type) of each changed module.
    skipped: (name, type, reason) of each recurrent module that was left alone.
    A module registered under several names stands here once, under the first; the model itself
    has the name "".
    """

    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        for name, old, new in self.replaced:
            lines.append(f"  {name or '(the model itself)'}: {old} -> {new}")
        for name, old, reason in self.skipped:
            lines.append(f"  {name or '(the model itself)'}: {old} left alone: {reason}")
        return "\n".join(lines)


def replace(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Turn every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell in `model` into fusedrnn's.

    In place, `model` itself included; `restore` undoes it. With filter_fn(name, module), only the
    modules for which it returns true. Left alone, and reported with the reason: subclasses of
    torch.nn's classes (derive them from fusedrnn's instead), modules whose forward was set on the
    instance, scripted modules, and those that are fusedrnn's already.

    After it, isinstance(module, torch.nn.LSTM) is False, and so for GRU and RNN; the cells still
    are torch.nn's cells. Raises TypeError if model is no torch.nn.Module or filter_fn no callable.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            "filter_fn must be None or a callable filter_fn(name, module) -> bool, "
            f"got {type(filter_fn).__name__}"
        )
    return _change_classes(model, _TO_FUSED, filter_fn)


def restore(model: nn.Module) -> Report:
    """Undo `replace`: turn every fusedrnn module in `model` into torch.nn's, in place.

    That includes modules that were built as fusedrnn's. Left alone, and reported with the reason:
    subclasses of fusedrnn's classes and modules whose forward was set on the instance. Raises
    TypeError if model is no torch.nn.Module.
    """
    return _change_classes(model, _TO_TORCH, None)


def _change_classes(
    model: nn.Module,
    mapping: dict[type[nn.Module], type[nn.Module]],
    filter_fn: Callable[[str, nn.Module], bool] | None,
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {_type_name(type(model))}")
    report = Report()
    changed: list[tuple[nn.Module, Any]] = []  # all at the end, as filter_fn may raise
    for name, module in model.named_modules():
        # A parametrized module is of a class of its own, made by torch, right below the real one.
        parametrized = is_parametrized(module)
        old = type(module).__bases__[0] if parametrized else type(module)
        reason = _reason_to_skip(module, old, mapping)
        if reason is None and old in mapping and filter_fn and not filter_fn(name, module):
            reason = "filter_fn refused it"
        if reason is not None:
            report.skipped.append((name, _type_name(old), reason))
        elif old in mapping:
            new: Any = mapping[old]
            report.replaced.append((name, _type_name(old), _type_name(new)))
            if parametrized:
                # Not by changing the class's base: deep copies of the module share the class.
                new = type(f"Parametrized{new.__name__}", (new,), dict(vars(type(module))))
            changed.append((module, new))
    for module, new in changed:
        module.__class__ = new
    return report


def _reason_to_skip(
    module: nn.Module, cls: type[nn.Module], mapping: dict[type[nn.Module], type[nn.Module]]
) -> str | None:
    """Why a recurrent module is left alone; None if it is not, or is no business of the mapping."""
    if cls in mapping:
        return "its forward was set on the instance" if "forward" in vars(module) else None
    if isinstance(module, torch.jit.ScriptModule):
        names = {original.__name__ for original in mapping}
        return "compiled by torch.jit.script" if module.original_name in names else None
    if mapping is _TO_FUSED and issubclass(cls, tuple(_TO_TORCH)):
        return "already fusedrnn's"
    for original, new in mapping.items():
        if issubclass(cls, original):
            if cls.forward is not original.forward:
                return f"a subclass of {_type_name(original)} with its own forward"
            return f"a subclass of {_type_name(original)}; derive it from {_type_name(new)} instead"
    return None


def _type_name(cls: type) -> str:
    if cls in _TO_TORCH.values():
        return f"torch.nn.{cls.__name__}"
    if cls in _TO_FUSED.values():
        return f"fusedrnn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
