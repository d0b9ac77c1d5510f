"""The specification: LSTM, GRU and RNN in plain torch operations, one cell in at most eight lines.

Tests compare the kernels with this file, and what the kernels cannot do (double backward, forward
mode, functorch transforms) is computed by it. It is written to be read, not to be fast.

The definitions are torch.nn's. LSTM: Hochreiter and Schmidhuber 1997 with the forget gate of Gers,
Schmidhuber and Cummins 2000. GRU: Cho et al. 2014 in the form that applies the reset gate after the
recurrent product. RNN: Elman 1990.

Shapes, for one layer with D directions: input [T, B, I], h0 and c0 [D, B, H], output [T, B, D*H].
`weights` holds four entries per direction: weight_ih [G*H, I], weight_hh [G*H, H], and bias_ih and
bias_hh [G*H], each of which may be None. Gate order: i, f, g, o (LSTM) and r, z, n (GRU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

Weights = Sequence[Tensor | None]


def lstm_step(
    gates_x: Tensor, state: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, ...]:
    h_prev, c_prev = state
    a_i, a_f, a_g, a_o = (gates_x + linear(h_prev, weight_hh, bias_hh)).chunk(4, -1)
    i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
    c = f * c_prev + i * g
    return o * c.tanh(), c


def gru_step(
    gates_x: Tensor, state: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, ...]:
    (h_prev,) = state
    a_xr, a_xz, a_xn = gates_x.chunk(3, -1)
    a_hr, a_hz, a_hn = linear(h_prev, weight_hh, bias_hh).chunk(3, -1)
    r, z = (a_xr + a_hr).sigmoid(), (a_xz + a_hz).sigmoid()
    n = (a_xn + r * a_hn).tanh()
    return ((1 - z) * n + z * h_prev,)


def rnn_tanh_step(
    gates_x: Tensor, state: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, ...]:
    return ((gates_x + linear(state[0], weight_hh, bias_hh)).tanh(),)


def rnn_relu_step(
    gates_x: Tensor, state: tuple[Tensor, ...], weight_hh: Tensor, bias_hh: Tensor | None
) -> tuple[Tensor, ...]:
    return ((gates_x + linear(state[0], weight_hh, bias_hh)).relu(),)


Step = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]
STEPS: dict[str, Step] = {
    "lstm": lstm_step,
    "gru": gru_step,
    "rnn_tanh": rnn_tanh_step,
    "rnn_relu": rnn_relu_step,
}


def scan(
    cell: str, input: Tensor, initial: tuple[Tensor, ...], weights: Weights
) -> tuple[Tensor, ...]:
    """One layer of `cell`, all its directions: (output, h_n) or, for LSTM, (output, h_n, c_n).

    `initial` is (h0,) or, for LSTM, (h0, c0), each [D, B, H]. A second direction runs from the last
    time step to the first; its output stands behind the first one's in the last dimension.
    """
    outputs, finals = [], []
    for direction in range(len(weights) // 4):
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * direction : 4 * direction + 4]
        assert weight_ih is not None
        assert weight_hh is not None
        gates_x = linear(input, weight_ih, bias_ih).unbind(0)
        state = tuple(s[direction] for s in initial)
        hs = []
        for gates_x_t in gates_x if direction == 0 else reversed(gates_x):
            state = STEPS[cell](gates_x_t, state, weight_hh, bias_hh)
            hs.append(state[0])
        outputs.append(torch.stack(hs if direction == 0 else hs[::-1]))
        finals.append(state)
    return torch.cat(outputs, -1), *(torch.stack(s) for s in zip(*finals, strict=True))
