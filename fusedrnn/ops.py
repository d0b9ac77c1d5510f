"""The only caller of the compiled kernels: checks, allocation, and the counters that say what ran.

csrc/sequence.h is the contract that this file keeps. Not an autograd layer: functional.py is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from fusedrnn import _C
except ImportError as error:
    raise RuntimeError(
        "fusedrnn's compiled extension fusedrnn._C cannot be loaded "
        f"({error}). Build it: `pip install .` in fusedrnn's source folder."
    ) from error

# Calls since import, by what computed them: a kernel, the reference in plain torch operations, or
# torch.nn's own implementation. One layer is one call.
counts = {"kernel_forward": 0, "kernel_backward": 0, "reference": 0, "torch": 0}


def count(what: str) -> None:
    """Adds one to `counts[what]`."""
    counts[what] += 1


def isa() -> str:
    """The instruction set whose kernels run: "avx512", "avx2" or "generic".

    The environment variable FUSEDRNN_ISA, read at import, overrides the choice.
    """
    return _ISA


_ISA = _C.isa()  # at import: a FUSEDRNN_ISA that cannot be had is an error here, not at first use


@dataclass(frozen=True)
class Cell:
    """What the host side must know of a cell; csrc/cells/ has the rest."""

    index: int  # in csrc/sequence.h's enum Cell
    gates: int  # row blocks of weight_ih and weight_hh
    grad_gates: int  # column blocks of grad_gates
    has_cell_state: bool
    has_extra: bool
    # (block of grad_gates, row block of weight_hh, number of blocks): what belongs together in the
    # recurrent weight's gradient. GRU's grad_gates are n_h, r, z, n_x.
    recurrent_blocks: tuple[tuple[int, int, int], ...]

    @property
    def first_input_block(self) -> int:
        """Where the columns of grad_gates that belong to weight_ih begin."""
        return self.grad_gates - self.gates


CELLS = {
    "lstm": Cell(0, 4, 4, True, True, ((0, 0, 4),)),
    "gru": Cell(1, 3, 4, False, True, ((1, 0, 2), (0, 2, 1))),
    "rnn_tanh": Cell(2, 1, 1, False, False, ((0, 0, 1),)),
    "rnn_relu": Cell(3, 1, 1, False, False, ((0, 0, 1),)),
}

_FORWARD = {torch.float32: _C.forward_f32, torch.float64: _C.forward_f64}
_BACKWARD = {torch.float32: _C.backward_f32, torch.float64: _C.backward_f64}
_PLAIN = (Tensor, torch.nn.Parameter)


def supported(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors as they are, here and now.

    They do when all are ordinary dense CPU tensors of one dtype, float32 or float64, and no transform
    (functorch, forward-mode AD, autocast) is active.
    """
    if (
        input.dtype not in _FORWARD
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    dtype = input.dtype
    for t in (input, *tensors):
        if t is not None and not (
            type(t) in _PLAIN
            and t.dtype is dtype
            and t.is_cpu
            and t.layout is torch.strided
            and not t.is_neg()
        ):
            return False
    return True


def check_layer(
    cell: str, input: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> None:
    """Raises a RuntimeError unless the shapes are those of one layer; see functional.py for them."""
    blocks = CELLS[cell].gates
    directions, rest = divmod(len(weights), 4)
    if rest or directions not in (1, 2):
        raise RuntimeError(
            "Expected 4 weights (weight_ih, weight_hh, bias_ih, bias_hh) for each of 1 or 2 "
            f"directions, got {len(weights)}"
        )
    if input.dim() != 3:
        raise RuntimeError(f"input must be [T, B, I], got {input.dim()} dimensions")
    steps, batch, features = input.shape
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    weight_hh = weights[1]
    if weight_hh is None or weight_hh.dim() != 2:
        raise RuntimeError("weight_hh must be a [G*H, H] tensor")
    hidden = weight_hh.shape[1]
    state = (directions, batch, hidden)
    for name, tensor in zip(("h0", "c0"), initial, strict=False):
        if tensor.shape != state:
            raise RuntimeError(f"{name} must be {list(state)}, got {list(tensor.shape)}")
    shapes = ((blocks * hidden, features), (blocks * hidden, hidden), (blocks * hidden,))
    for i, weight in enumerate(weights):
        if weight is None:
            if i % 4 < 2:
                raise RuntimeError(f"{_WEIGHT_NAMES[i % 4]} must not be None")
        elif weight.shape != shapes[min(i % 4, 2)]:
            raise RuntimeError(
                f"{_WEIGHT_NAMES[i % 4]} must be {list(shapes[min(i % 4, 2)])}, "
                f"got {list(weight.shape)}"
            )


_WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _product(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a weight^T + bias."""
    if bias is None:
        torch.mm(a, weight.t(), out=out)
    else:
        torch.addmm(bias, a, weight.t(), out=out)


@dataclass
class Saved:
    """What the forward kernel leaves for the backward one; csrc/sequence.h says what is in them."""

    gates: Tensor  # [D, T, B, G*H]
    extra: Tensor | None  # [D, T, B, H]


def forward(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    save: bool,
) -> tuple[tuple[Tensor, ...], Saved]:
    """One layer through the kernel, outside autograd; arguments have passed supported and check_layer.

    Returns (output, h_n) or, for LSTM, (output, h_n, c_n), and what backward needs if `save`.
    """
    count("kernel_forward")
    spec = CELLS[cell]
    directions = len(weights) // 4
    steps, batch, features = input.shape
    hidden = initial[0].shape[2]
    columns = spec.gates * hidden

    # The input projection of all time steps at once is a large GEMM: torch's business.
    gates = input.new_empty(directions, steps, batch, columns)
    input_rows = input.flatten(0, 1)
    initial = [s.contiguous() for s in initial]
    weights_hh: list[Tensor | None] = [None, None]
    biases_hh: list[Tensor | None] = [None, None]
    gates_h = input.new_empty(directions, batch, columns) if steps == 1 else None
    for d in range(directions):
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * d : 4 * d + 4]
        assert weight_ih is not None
        assert weight_hh is not None
        _product(input_rows, weight_ih, bias_ih, gates[d].flatten(0, 1))
        if gates_h is not None:
            _product(initial[0][d], weight_hh, bias_hh, gates_h[d])
        else:
            weights_hh[d] = weight_hh.contiguous()
            biases_hh[d] = None if bias_hh is None else bias_hh.contiguous()

    extra = input.new_empty(directions, steps, batch, hidden) if save and spec.has_extra else None
    output = input.new_empty(steps, batch, directions * hidden)
    finals = tuple(input.new_empty(directions, batch, hidden) for _ in initial)
    _FORWARD[input.dtype](
        spec.index,
        steps,
        batch,
        hidden,
        directions,
        torch.get_num_threads(),
        save,
        gates.data_ptr(),
        _address(extra),
        *map(_address, weights_hh),
        *map(_address, biases_hh),
        _address(gates_h),
        initial[0].data_ptr(),
        initial[1].data_ptr() if spec.has_cell_state else 0,
        output.data_ptr(),
        finals[0].data_ptr(),
        finals[1].data_ptr() if spec.has_cell_state else 0,
    )
    return (output, *finals), Saved(gates, extra)


@dataclass
class PreActivationGrads:
    """What the backward kernel computes; functional.py turns it into the gradients of the inputs."""

    grad_gates: Tensor  # [D, T, B, E*H]
    h_prev: Tensor | None  # [D, T, B, H]
    carry: Tensor | None  # [D, B, H]: LSTM grad_c0; GRU what grad_h0 owes to h0 directly


def backward(
    cell: str,
    saved: Saved,
    initial: Sequence[Tensor],
    weights_hh: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_finals: Sequence[Tensor | None],
    want_h_prev: bool,
) -> PreActivationGrads:
    """The backward recurrence of one layer, from what `forward` saved."""
    count("kernel_backward")
    spec = CELLS[cell]
    gates = saved.gates
    directions, steps, batch, columns = gates.shape
    hidden = columns // spec.gates
    shape = (directions, steps, batch, hidden)

    initial = [s.contiguous() for s in initial]
    weights_hh = [w.contiguous() for w in weights_hh]
    grad_output = None if grad_output is None else grad_output.contiguous()
    grad_h_n = None if grad_finals[0] is None else grad_finals[0].contiguous()
    carry = None
    if spec.has_cell_state and grad_finals[1] is not None:
        # A copy: the kernel works in place, and the caller's gradient is not ours.
        carry = torch.empty_like(initial[0]).copy_(grad_finals[1])
    elif spec.has_extra:
        carry = torch.zeros_like(initial[0])
    h_prev = gates.new_empty(shape) if want_h_prev or cell == "gru" else None
    grad_gates = gates.new_empty(directions, steps, batch, spec.grad_gates * hidden)
    _BACKWARD[gates.dtype](
        spec.index,
        steps,
        batch,
        hidden,
        directions,
        torch.get_num_threads(),
        gates.data_ptr(),
        _address(saved.extra),
        weights_hh[0].data_ptr(),
        weights_hh[1].data_ptr() if directions == 2 else 0,
        initial[0].data_ptr(),
        initial[1].data_ptr() if spec.has_cell_state else 0,
        _address(grad_output),
        _address(grad_h_n),
        _address(carry),
        grad_gates.data_ptr(),
        _address(h_prev),
    )
    return PreActivationGrads(grad_gates, h_prev, carry)
