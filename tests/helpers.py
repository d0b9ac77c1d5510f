"""What several test files share: torch.nn's module and ours with the same weights, comparison of
results and gradients, and the counters that say who computed. No tests."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fusedrnn import modules, ops

LAYERS = ("LSTM", "GRU", "RNN_tanh", "RNN_relu")
CELLS = ("LSTMCell", "GRUCell", "RNNCell_tanh", "RNNCell_relu")

# Both sides are of the same dtype: the bound is on the difference of two rounded results.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


def build(namespace, kind, *args, seed=0, **kwargs):
    """Module `kind` ("LSTM", "RNN_relu", ...) of namespace torch.nn or fusedrnn.modules, seeded."""
    name, _, nonlinearity = kind.partition("_")
    if nonlinearity:
        kwargs["nonlinearity"] = nonlinearity
    torch.manual_seed(seed)
    return getattr(namespace, name)(*args, **kwargs)


def with_build_tools(path=None):
    """The search path `path`, else that of the environment, after what lies beside this Python:
    cmake and ninja, which need not be on it."""
    return os.path.dirname(sys.executable) + os.pathsep + (path or os.environ["PATH"])


def python(*arguments, **environment):
    """The finished process of this Python in the project's folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def pair(kind, *args, **kwargs):
    """(torch.nn's module, ours), built from the same seed."""
    return build(nn, kind, *args, **kwargs), build(modules, kind, *args, **kwargs)


def states(kind, *shape, dtype=torch.float64, seed=2):
    """A random hx for `kind`: (h, c) for LSTM and LSTMCell, otherwise a tensor."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2)]
    return tuple(made) if kind.startswith("LSTM") else made[0]


def flat(*results):
    """The tensors of nested tuples and lists, in order; None is left out."""
    if len(results) != 1 or isinstance(results[0], (tuple, list)):
        nested = results if len(results) != 1 else results[0]
        return [tensor for result in nested for tensor in flat(result)]
    return [] if results[0] is None else [results[0]]


def run(module, input, hx=None, seed=3):
    """Forward, and backward from every result: {what: tensor}, the gradients included.

    The input and hx are cloned as leaves (an expanded hx stays expanded), so that runs of several
    modules do not meet.
    """
    leaves = [input.detach().clone().requires_grad_()]
    leaves += [_leaf(state) for state in flat(hx)]
    hx = [_as(state, leaf) for state, leaf in zip(flat(hx), leaves[1:], strict=True)] or None
    if hx is not None and len(hx) == 1:
        hx = hx[0]
    module.zero_grad()
    torch.manual_seed(seed)  # of the dropout
    results = flat(module(leaves[0]) if hx is None else module(leaves[0], hx))
    generator = torch.Generator().manual_seed(seed)
    # The same for every dtype, and exact in each of them.
    weights = [torch.randn(r.shape, generator=generator).bfloat16().to(r) for r in results]
    sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
    named = {f"result {i}": r.detach() for i, r in enumerate(results)}
    named |= {f"grad of argument {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return named | {f"grad of {n}": p.grad for n, p in module.named_parameters()}


def _leaf(state):
    if state.dim() and 0 in state.stride() and state.numel():
        state = state[tuple(slice(0, 1) if s == 0 else slice(None) for s in state.stride())]
    return state.detach().clone().requires_grad_()


def _as(state, leaf):
    return leaf if leaf.shape == state.shape else leaf.expand(state.shape)


def assert_same(actual, expected, dtype=torch.float64):
    """Two dictionaries of tensors are equal within TOLERANCE, key by key, shapes and dtypes too."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None, f"{key} is there"
            continue
        assert actual[key] is not None, f"{key} is missing"
        torch.testing.assert_close(
            actual[key],
            value,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype],
            msg=lambda text, key=key: f"{key}: {text}",
        )


@contextmanager
def ran(*expected):
    """What is done inside is counted under each of `expected`, and under no other name.

    Names: "kernel_forward", "kernel_backward", "reference", "torch" (see ops.counts).
    """
    before = dict(ops.counts)
    yield
    rose = {name for name, count in ops.counts.items() if count > before[name]}
    assert rose == set(expected)


@contextmanager
def matmul_precision(precision):
    """torch.set_float32_matmul_precision(precision), inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def raised(function):
    """The exception that function() raises, which it must."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
