"""patched(): models that other code builds, built of fusedrnn's modules.

Many names refer to the class torch.nn.LSTM: torch.nn's, torch.nn.modules', and whatever imported it
before. So the names stay, and the class's constructor is exchanged: it makes a torch.nn module as
ever, and then changes the class of what it made. `__init__` and not `__new__`: CPython never quite
takes back a `__new__` that was set (object.__new__ then refuses arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.compiler import is_compiling

from . import modules


def _called(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """cls.forward(*args, **kwargs), hidden from torch.compile where it is active.

    Dynamo refuses every torch.nn.LSTM, but tries each function that its forward calls.
    """
    if not is_compiling() and get_eval_frame_callback() is not None:
        return modules._outside_graph(cls.forward, *args, **kwargs)
    return cls.forward(*args, **kwargs)


def _named_as(cls: Any) -> Callable[[Any], Any]:
    """Decorates a forward with the names of cls.forward's arguments, which torch.export reads."""
    return wraps(cls.forward)


class LSTM(modules.LSTM, nn.LSTM):
    """fusedrnn.LSTM that is a torch.nn.LSTM for isinstance too, as `patched` makes it.

    For torch.compile too, which compiles the rest of a function no more once it meets one.
    """

    _torch_class = nn.LSTM
    __init__ = nn.LSTM.__init__

    @_named_as(modules.LSTM)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _called(modules.LSTM, self, *args, **kwargs)


class GRU(modules.GRU, nn.GRU):
    """As LSTM above."""

    _torch_class = nn.GRU
    __init__ = nn.GRU.__init__

    @_named_as(modules.GRU)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _called(modules.GRU, self, *args, **kwargs)


class RNN(modules.RNN, nn.RNN):
    """As LSTM above."""

    _torch_class = nn.RNN
    __init__ = nn.RNN.__init__

    @_named_as(modules.RNN)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _called(modules.RNN, self, *args, **kwargs)


# What torch.nn's constructors make instead. The cells are torch.nn's cells already.
CLASSES: tuple[Any, ...] = (
    LSTM,
    GRU,
    RNN,
    modules.LSTMCell,
    modules.GRUCell,
    modules.RNNCell,
)

_lock = Lock()
_depth = 0  # how many `patched` are active, in all threads
_constructors: dict[Any, tuple[Any, Any]] = {}  # of a torch.nn class: the original, and ours


def _making(cls: Any, made: Any, original: Callable[..., None]) -> Callable[..., None]:
    """The constructor `original` of torch.nn's `cls`, making a `made` instead."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _depth and type(self) is cls:
            self.__class__ = made

    return __init__


@contextmanager
def patched() -> Iterator[None]:
    """Inside `with patched():`, torch.nn's LSTM, GRU, RNN and cells are built as fusedrnn's.

    Whatever name the code that builds them uses for the class; in all threads of the process. For
    isinstance the modules are torch.nn's, inside and after, and they stay as they are after it.
    `restore` makes them torch.nn's. `replace` makes them fusedrnn.LSTM and so on, behind which
    torch.compile goes on, while it compiles no more of a function that has met a torch.nn.LSTM.

    Not reached: modules built before, copies and pickles of those; subclasses of torch.nn's
    classes, whether they override forward or not. type(module) is torch.nn.LSTM is False. A module
    pickled as a whole needs fusedrnn to be loaded; a state_dict does not.

    May be nested and entered by several threads; the last one that leaves puts torch.nn's own
    constructors back, as it does after an exception.
    """
    global _depth
    with _lock:
        if not _depth:
            for made in CLASSES:
                cls = made._torch_class
                original = vars(cls)["__init__"]
                _constructors[cls] = original, _making(cls, made, original)
                cls.__init__ = _constructors[cls][1]
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                for cls, (original, ours) in _constructors.items():
                    # One that somebody put over ours stays; ours does nothing any more under it.
                    if vars(cls)["__init__"] is ours:
                        cls.__init__ = original
                _constructors.clear()
