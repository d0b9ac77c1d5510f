"""The accuracy that csrc/cells/math.h states: tanh and sigmoid within 2 ULP in float, 4 in double.

Measured through the kernels: with no recurrent weights an RNN step is tanh of its input projection,
and an LSTM step whose c0 is 1 and whose cell gate is tanh(0) leaves sigmoid of the forget gate in
c_n.
"""

import mpmath
import numpy as np
import pytest
import torch
from helpers import ran

from fusedrnn import functional

DTYPES = {torch.float32: (np.float32, 2), torch.float64: (np.float64, 4)}
UNITS = 64


def kernel_tanh(x):
    """tanh of [B, UNITS] values, as one step of B rows."""
    rows, units = x.shape
    zeros = torch.zeros(1, rows, units, dtype=x.dtype)
    weights = (torch.eye(units, dtype=x.dtype), torch.zeros(units, units, dtype=x.dtype))
    with torch.no_grad(), ran("kernel_forward"):
        return functional.rnn(x[None], zeros, (*weights, None, None))[0][0]


def kernel_sigmoid(x):
    rows, units = x.shape
    state = torch.zeros(1, rows, units, dtype=x.dtype)
    weight_ih = torch.zeros(4, units, units, dtype=x.dtype)
    weight_ih[1] = torch.eye(units)  # only the forget gate sees the input
    weight_hh = torch.zeros(4 * units, units, dtype=x.dtype)
    with torch.no_grad(), ran("kernel_forward"):
        weights = (weight_ih.flatten(0, 1), weight_hh, None, None)
        return functional.lstm(x[None], state, state + 1, weights)[2][0]


FUNCTIONS = {
    "tanh": (kernel_tanh, np.tanh, mpmath.tanh),
    "sigmoid": (kernel_sigmoid, lambda x: 1 / (1 + np.exp(-x)), lambda x: 1 / (1 + mpmath.exp(-x))),
}


def arguments(dtype, rows):
    """[rows, UNITS] of magnitudes over the whole range, denser where the functions bend."""
    rng = np.random.default_rng(0)
    numpy_type, _ = DTYPES[dtype]
    info = np.finfo(numpy_type)
    count = rows * UNITS // 8
    underflow = -np.log(float(info.tiny))
    magnitudes = np.concatenate(
        [
            rng.uniform(0, 10, count),
            rng.uniform(0, 1, count),
            rng.uniform(0, 1.02 * underflow, count),
            np.exp(rng.uniform(-underflow, np.log(float(info.max)), count)),
        ]
    )
    return torch.from_numpy(np.concatenate([magnitudes, -magnitudes]).astype(numpy_type)).view(
        rows, UNITS
    )


def exactly(name, x):
    """The function's exact values: in double for float arguments, in 160 bits for double ones."""
    _, in_double, in_mpmath = FUNCTIONS[name]
    if x.dtype == np.float32:
        with np.errstate(over="ignore"):
            return in_double(x.astype(np.float64))
    with mpmath.workprec(160):
        # Rounding to double costs half a ULP, which the bound has to spare.
        return np.array([float(in_mpmath(mpmath.mpf(float(v)))) for v in x.clip(-1000, 1000)])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_bound(name, dtype):
    numpy_type, bound = DTYPES[dtype]
    tiny = np.finfo(numpy_type).tiny
    x = arguments(dtype, 4000 if dtype == torch.float32 else 250)
    result = FUNCTIONS[name][0](x).flatten().numpy()
    exact = exactly(name, x.flatten().numpy())
    normal = np.abs(exact) >= tiny
    assert (np.abs(result[~normal]) <= tiny).all()  # flushed to zero, or as small
    ulp = np.spacing(np.abs(exact[normal]).astype(numpy_type)).astype(np.float64)
    error = np.abs(result[normal].astype(np.float64) - exact[normal]) / ulp
    assert error.max() <= bound
    assert error.max() > 0.4  # a correctly rounded function has 0.5: less, and nothing was measured


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype):
    x = torch.tensor([0.0, -0.0, np.inf, -np.inf, np.nan], dtype=dtype)
    units = len(x)
    # Through a bias: in a product with zero weights infinities would be NaN.
    nothing, zeros = torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, units, dtype=dtype)
    forget = torch.zeros(4, units, dtype=dtype)
    forget[1] = x
    with torch.no_grad(), ran("kernel_forward"):
        no_weights = [torch.zeros(4 * units, n, dtype=dtype) for n in (1, units)]
        tanh, _ = functional.rnn(nothing, zeros, (*(w[:units] for w in no_weights), x, None))
        weights = (*no_weights, forget.flatten(), None)
        _, _, sigmoid = functional.lstm(nothing, zeros, zeros + 1, weights)
    torch.testing.assert_close(
        tanh[0, 0], torch.tensor([0, 0, 1, -1, np.nan], dtype=dtype), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        sigmoid[0, 0],
        torch.tensor([0.5, 0.5, 1, 0, np.nan], dtype=dtype),
        rtol=0,
        atol=0,
        equal_nan=True,
    )
