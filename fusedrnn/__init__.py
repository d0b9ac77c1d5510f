"""Fused LSTM, GRU and RNN for PyTorch: drop-in modules over hand-written kernels.

`replace(model)` swaps the recurrent modules inside a model; `with patched():` has other code build
its models of them; LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell are the modules themselves, with
torch.nn's signatures and results.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from fusedrnn import functional
    from fusedrnn.convert import replace, restore
    from fusedrnn.explanation import explain
    from fusedrnn.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from fusedrnn.ops import isa
    from fusedrnn.patching import patched
    from fusedrnn.prepacking import prepacked
except Exception:
    # `python -m fusedrnn` says what is wrong. Python imports this to find it, and argv[0] is "-m".
    if sys.argv[:1] != ["-m"] or {"fusedrnn", "-mfusedrnn"}.isdisjoint(sys.orig_argv):
        raise

try:
    __version__ = version("fusedrnn")  # pyproject.toml has it, and only it
except PackageNotFoundError:  # on sys.path, but not installed
    __version__ = "unknown"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "explain",
    "functional",
    "isa",
    "patched",
    "prepacked",
    "replace",
    "restore",
]
