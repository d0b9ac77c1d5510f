"""The specification: LSTM, GRU and RNN in plain torch operations, one cell in at most eight lines.

Tests compare the kernels with this file, and what the kernels cannot do (double backward, forward
mode, functorch transforms) is computed by it. It is written to be read, not to be fast.

The definitions are torch.nn's. LSTM: Hochreiter and Schmidhuber 1997 with the forget gate of Gers,
Schmidhuber and Cummins 2000. GRU: Cho et al. 2014 in the form that applies the reset gate after the
recurrent product. RNN: Elman 1990.

Shapes, for one layer with D directions: input [T, B, I], h0 [D, B, P], c0 [D, B, H], output
[T, B, D*P]. `weights` holds four entries per direction: weight_ih [G*H, I], weight_hh [G*H, P], and
bias_ih and bias_hh [G*H], each of which may be None; or, for an LSTM with a projection (Sak et al.
2014), five: weight_hr [P, H] too. Without it, P = H. Gate order: i, f, g, o (LSTM) and r, z, n
(GRU).
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
    cell: str,
    input: Tensor,
    initial: tuple[Tensor, ...],
    weights: Weights,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to_initial: bool = False,
    cells: bool = False,
) -> tuple[Tensor, ...]:
    """One layer of `cell`, all its directions: (output, h_n) or, for LSTM, (output, h_n, c_n).

    `initial` is (h0,) or, for LSTM, (h0, c0); or (), for zeros. A second direction runs from the
    last time step to the first; its output stands behind the first one's in the last dimension. The
    other arguments are those of ops.Options; with `cells`, c of all steps is the last result.
    """
    per_direction = 5 if len(weights) % 5 == 0 else 4
    if not initial:
        weight_hh = weights[1]
        assert weight_hh is not None
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        rows, size = weight_hh.shape
        initial = tuple(
            input.new_zeros(len(weights) // per_direction, batch, width)
            for width in ((size, rows // 4) if cell == "lstm" else (size,))
        )
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    by_time = (lambda x: x.unbind(0)) if sizes is None else (lambda x: torch.split(x, sizes))
    resets = None if reset is None else by_time(reset)
    directions = []
    for d in range(len(weights) // per_direction):
        weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr = weights[
            per_direction * d : per_direction * (d + 1)
        ]
        assert weight_ih is not None
        assert weight_hh is not None
        gates_x = linear(input, weight_ih, bias_ih)
        steps = list(enumerate(by_time(gates_x)))
        start = tuple(s[d] for s in initial)
        state = tuple(s[: steps[-d][1].shape[0]] for s in start)
        ended: list[tuple[Tensor, ...]] = []  # states of the sequences that are at their end
        every = []
        for t, gates_x_t in steps if d == 0 else reversed(steps):
            rows = running = 0  # where all run always
            if sizes is not None:
                rows, running = gates_x_t.shape[0], state[0].shape[0]
            if running > rows:
                ended.insert(0, tuple(s[rows:] for s in state))
                state = tuple(s[:rows] for s in state)
            if resets is not None and t + d < len(steps):
                # The boundary lies before the later one of the two steps in time.
                cut = resets[t + d].unsqueeze(-1)
                fresh = [s[: cut.shape[0]] if reset_to_initial else s.new_zeros(()) for s in start]
                state = tuple(torch.where(cut, f, s) for f, s in zip(fresh, state, strict=True))
            if running < rows:
                state = tuple(
                    torch.cat((s, s0[running:rows])) for s, s0 in zip(state, start, strict=True)
                )
            state = STEPS[cell](gates_x_t, state, weight_hh, bias_hh)
            if weight_hr:
                assert weight_hr[0] is not None
                state = (linear(state[0], weight_hr[0]), *state[1:])
            every.append(state)
        if d == 1:
            every.reverse()
        join = torch.stack if sizes is None else torch.cat
        final = tuple(torch.cat(parts) for parts in zip(state, *ended, strict=True))
        directions.append(([join(s) for s in zip(*every, strict=True)], final))
    every_step, at_end = zip(*directions, strict=True)
    sequences = [torch.cat(s, -1) for s in zip(*every_step, strict=True)]
    finals = [torch.stack(s) for s in zip(*at_end, strict=True)]
    return sequences[0], *finals, *(sequences[1:] if cells else ())
