"""One layer on a CUDA device: what ops.py's forward and backward are on a CPU.

Torch computes the products with all time steps at once, before and after the recurrence, and
csrc/cuda/ the recurrence: csrc/cuda/kernels.h has the contract. Here are the checks that it relies
on, the memory, and the choice between the paths. One step alone (input [B, I]) is torch's.

float32 products with the recurrent weights are TF32 where torch allows it to recurrent layers
(torch.backends.cudnn.rnn.fp32_precision, or allow_tf32); those outside the recurrence follow the
setting of torch's matrix products.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import NotImplementedType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

import fusedrnn._C as _C

from . import ops

_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 3, torch.float16: 4}
_TF32 = 2  # the one of csrc/cuda/kernels.h that is no dtype

# "step", "block" or "torch" instead of the table's choice: for tests.
forced = os.environ.get("FUSEDRNN_KERNEL", "")
if forced not in ("", "step", "block", "torch"):
    raise RuntimeError(f"FUSEDRNN_KERNEL must be step, block or torch, got {forced!r}")


def available(device: torch.device) -> bool:
    """Whether this build has CUDA kernels, and the device is of those that any build can be for."""
    return hasattr(_C, "CudaLayer") and _capability(device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def takes(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
) -> bool:
    """Whether the CUDA kernels take these tensors: ordinary dense ones on one CUDA device, of one
    dtype, float32, float64, bfloat16 or float16, of the shapes of one layer (`ops.check_layer`)."""
    return (
        input.is_cuda and available(input.device) and _fits(cell, input, initial, weights, options)
    )


def _fits(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
) -> bool:
    for t in (input, *initial, *weights):
        if t is not None and not (
            type(t) in (Tensor, Parameter)
            and t.layout is torch.strided
            and t.device == input.device
            and t.dtype == input.dtype
            and not t.is_neg()
        ):
            return False
    packed = options is not None and options.batch_sizes is not None
    if input.dtype not in _NUMBERS or not input.shape[0] or (input.dim() != 3 and not packed):
        return False
    try:
        ops.check_layer(cell, input, initial, weights, options)
    except RuntimeError:
        return False
    return packed or bool(input.shape[1])


def torch_is_faster(cell: str, hidden: int, input: Tensor, module: Any) -> bool:
    """Whether torch.nn would take a kernel of cuDNN's that is known to be faster, for [T, B, I].

    That is its persistent one, for one layer and direction in float16; torch's rule for it, less
    where a layer is small enough for the block path. On an H100 it is published to take 2.0 us a
    step at (B, H) = (16, 768), where one launch after another alone takes 2.7.
    """
    if forced:
        return forced == "torch"
    batch, features = input.shape[1:]
    return (
        input.dtype is torch.float16
        and module.num_layers == 1
        and not module.bidirectional
        and cell != "gru"
        and hidden % 128 == 0
        and 128 < hidden <= 1024
        and features % 128 == 0
        and batch % 8 == 0
        and batch <= 128
        and not (cell.startswith("rnn") and batch >= 96 and hidden >= 896)
        and _is_data_center(input.device)
    )


def _is_data_center(device: torch.device) -> bool:
    """A GPU on which torch takes that kernel: sm_x6 ones and small ones it leaves out."""
    found = torch.cuda.get_device_properties(device)
    return found.major >= 8 and found.minor != 6 and found.multi_processor_count >= 98


def plan(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
) -> str | None:
    """ "block" or "step": how `forward` would run; None if not `takes`. Computes nothing."""
    if not takes(cell, input, initial, weights, options):
        return None
    return "block" if _Layer(cell, input, initial, weights, options).block(False) else "step"


class _Sizes(NamedTuple):
    """A layer's, in the letters of csrc/sequence.h."""

    T: int
    B: int
    rows: int
    H: int
    P: int
    D: int
    G: int  # gates, and the rows of their gradients:
    E: int


class _Layer:
    """One call's shapes, and its weights by direction."""

    def __init__(
        self,
        cell: str,
        input: Tensor,
        initial: ops.Tensors,
        weights: ops.Weights,
        options: ops.Options | None,
    ) -> None:
        self.cell = ops.CELLS[cell]
        self.options = options or ops.Options()
        self.dtype, self.device = input.dtype, input.device
        self.acc = torch.promote_types(input.dtype, torch.float32)
        each = ops.weights_per_direction(weights)
        self.weights = [_padded(weights[i : i + each]) for i in range(0, len(weights), each)]
        self.projected = each == 5
        gates = self.cell.gates
        hidden, size = self.weights[0][1].shape[0] // gates, self.weights[0][1].shape[1]
        offsets = None
        if self.options.batch_sizes is not None:
            sizes = self.options.batch_sizes.tolist()
            offsets = [0]
            for count in sizes:
                offsets.append(offsets[-1] + count)
            T, B, rows = len(sizes), sizes[0], input.shape[0]
        else:
            T, B = input.shape[:2]
            rows = T * B
        gradients = gates + (cell == "gru")
        self.sizes = _Sizes(T, B, rows, hidden, size, len(self.weights), gates, gradients)
        self.input = input.reshape(rows, -1)
        self.initial = [s.contiguous() for s in initial]
        # Kept here, as all that the kernels get an address of.
        self.offsets = None if offsets is None else torch.tensor(offsets, device=input.device)
        reset = self.options.reset
        self.reset = None if reset is None else reset.to(input.device).contiguous()
        number = _NUMBERS[input.dtype]
        self.number = _TF32 if number == 1 and _tf32() else number
        self.kernels = _C.CudaLayer(
            cell=self.cell.number,
            number=self.number,
            T=T,
            B=B,
            H=hidden,
            P=size,
            D=len(self.weights),
            offsets=offsets,
            device_offsets=_address(self.offsets),
            reset=_address(self.reset),
            reset_to_initial=self.options.reset_to_initial,
            device=input.device.index or 0,
            stream=torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0,
        )

    def addresses(self, which: int) -> list[int]:
        """Of weights[which] of both directions."""
        found = [_address(w[which]) for w in self.weights]
        return (found * 2)[:2] if len(found) == 2 else [*found, 0]

    def workspace(self) -> Tensor:
        return self.empty(self.kernels.workspace_bytes(self.projected), dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.device)

    def state(self, i: int) -> Tensor | None:
        return self.initial[i] if i < len(self.initial) else None

    def block(self, backward: bool) -> bool:
        """Whether by the block path; else by the step path."""
        if self.projected or forced == "step":
            return False
        ctas = self.kernels.block_ctas(backward)
        if forced == "block":
            if not ctas:
                raise RuntimeError(
                    f"FUSEDRNN_KERNEL=block: H = {self.sizes.H} in {_name(self.dtype)} is too large"
                )
            return True
        # Each CTA takes 8 rows, and all steps. In more than two rounds of them the step path's
        # wider tiles should win: an estimate, measured on no GPU.
        return 2 * ctas >= -(-self.sizes.B // 8) * self.sizes.D

    def saved_parts(self, save: bool) -> tuple[int, int, int]:
        """How many numbers of extra (in `acc`), gates and hidden there are to save."""
        s = self.sizes
        each = s.D * s.rows
        lstm, recompute = self.cell.states == 2, self.options.recompute and save
        extra = each * s.H if save and self.cell.extra and (lstm or not recompute) else 0
        gates = each * s.H * s.G if save and not recompute else 0
        return extra, gates, each * s.P if save and (self.projected or recompute) else 0

    def split(self, saved: Tensor) -> list[Tensor | None]:
        """[extra, gates, hidden] of the memory that saves them; None for those of no numbers."""
        counts = self.saved_parts(True)
        words = self.acc.itemsize // self.dtype.itemsize
        extra, gates, hidden = torch.split(saved, [counts[0] * words, *counts[1:]])
        parts = extra.view(self.acc), gates, hidden
        return [p if p.numel() else None for p in parts]

    def new_saved(self) -> Tensor:
        extra, gates, hidden = self.saved_parts(True)
        return self.empty(extra * (self.acc.itemsize // self.dtype.itemsize) + gates + hidden)


def _padded(weights: Sequence[Tensor | None]) -> list[Any]:
    """The five of one direction, dense."""
    dense = [w if w is None else w.contiguous() for w in weights]
    return dense + [None] * (5 - len(dense))


def arithmetic(dtype: torch.dtype) -> str:
    """What the kernels compute in, in words."""
    if dtype is torch.float32 and _tf32():
        return "float32, recurrent products in TF32"
    if dtype in (torch.float16, torch.bfloat16):
        return f"{_name(dtype)} products summed in float32"
    return _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tf32() -> bool:
    """Whether torch allows TF32 to recurrent layers."""
    rnn = getattr(torch.backends.cudnn, "rnn", None)
    if rnn is not None:
        return bool(rnn.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def forward(
    cell: str,
    save: bool,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """ops.forward of what `takes` said yes to. RuntimeError for an error of CUDA's."""
    layer = _Layer(cell, input, initial, weights, options)
    s, cells, lstm = layer.sizes, layer.options.cells, layer.cell.states == 2
    gates_x = [linear(layer.input, w[0], w[2]) for w in layer.weights]
    saved = layer.new_saved() if save else None
    extra, gates, hidden = (None,) * 3 if saved is None else layer.split(saved)
    if lstm and extra is None:
        extra = layer.empty(s.D, s.rows if cells else s.B, s.H, dtype=layer.acc)
    output = layer.empty(s.rows, s.D * s.P)
    h_n = layer.empty(s.D, s.B, s.P)
    c_n = layer.empty(s.D, s.B, s.H) if lstm else None
    unprojected = layer.empty(s.D, s.B, s.H) if layer.projected else None
    workspace = layer.workspace()
    layer.kernels.forward(
        block=layer.block(False),
        workspace=_address(workspace),
        gates_x=[_address(g) for g in gates_x] + [0] * (2 - s.D),
        weight_hh=layer.addresses(1),
        bias_hh=layer.addresses(3),
        weight_hr=layer.addresses(4),
        h0=_address(layer.state(0)),
        c0=_address(layer.state(1)),
        gates=_address(gates),
        extra=_address(extra),
        every_cell=save or cells,
        unprojected=_address(unprojected),
        hidden=_address(hidden),
        output=_address(output),
        h_n=_address(h_n),
        c_n=_address(c_n),
    )
    results = [output, h_n]
    if c_n is not None:
        results.append(c_n)
    if cells:
        assert extra is not None
        every = extra.view(s.D, s.rows, s.H).transpose(0, 1).reshape(s.rows, s.D * s.H)
        results.append(every.to(layer.dtype))
    if layer.offsets is None:
        results = [
            r if 0 < i < 1 + layer.cell.states else r.view(s.T, s.B, -1)
            for i, r in enumerate(results)
        ]
    return tuple(results), saved


def backward(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
    saved: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    groups: int,
) -> tuple[Tensor | None, ...] | NotImplementedType | None:
    """ops.backward of what `forward` computed; None if `saved` is not as it left it. NotImplemented
    for `groups`."""
    if groups:
        return NotImplemented  # type: ignore[no-any-return]
    layer = _Layer(cell, input, initial, weights, options)
    s = layer.sizes
    if saved.dtype != layer.dtype or saved.device != layer.device or saved.dim() != 1:
        return None
    counts = layer.saved_parts(True)
    if len(saved) != counts[0] * (layer.acc.itemsize // layer.dtype.itemsize) + sum(counts[1:]):
        return None
    saved = saved.contiguous()
    extra, gates, hidden = layer.split(saved)
    h0, c0 = layer.state(0), layer.state(1)
    lstm = layer.cell.states == 2
    previous = layer.empty(s.D, s.rows, s.P)
    layer.kernels.previous(
        gates=_address(gates),
        extra=_address(extra),
        hidden=_address(hidden),
        h0=_address(h0),
        previous=_address(previous),
    )
    if gates is None:
        gates, extra = _gates_again(cell, layer, previous, extra)
    dense = [g if g is None else g.contiguous() for g in grads]
    dense += [None] * (4 - len(dense))
    if not lstm:
        dense = [dense[0], dense[1], None, None]
    first_weight = 1 + len(initial)
    grad_gates = layer.empty(s.D, s.rows, s.E * s.H)
    grad_hidden = layer.empty(s.D, s.rows, s.P) if layer.projected else None
    carry = layer.zeros(s.D, s.B, s.H)
    grad_h0 = layer.zeros(s.D, s.B, s.P) if any(needed[1:2]) and initial else None
    grad_c0 = layer.zeros(s.D, s.B, s.H) if lstm and initial and needed[2] else None
    workspace = layer.workspace()
    layer.kernels.backward(
        block=layer.block(True),
        workspace=_address(workspace),
        weight_hh=layer.addresses(1),
        weight_hr=layer.addresses(4),
        gates=_address(gates),
        extra=_address(extra),
        previous=_address(previous),
        c0=_address(c0),
        grad_output=_address(dense[0]),
        grad_h_n=_address(dense[1]),
        grad_c_n=_address(dense[2]),
        grad_cells=_address(dense[3]),
        grad_gates=_address(grad_gates),
        grad_hidden=_address(grad_hidden),
        carry=_address(carry),
        grad_h0=_address(grad_h0),
        grad_c0=_address(grad_c0),
    )
    found: list[Tensor | None] = [None]
    for grad in (grad_h0, grad_c0)[: len(initial)]:
        found.append(None if grad is None else grad.to(layer.dtype))
    each = 5 if layer.projected else 4
    for d, w in enumerate(layer.weights):
        wanted = needed[first_weight + d * each : first_weight + (d + 1) * each]
        # GRU's: of n's recurrent part, r, z, n's other part; so the first three are weight_hh's,
        # rotated, and the last three weight_ih's.
        of_x = grad_gates[d][:, (s.E - s.G) * s.H :]
        of_h = grad_gates[d][:, : s.G * s.H]
        if needed[0]:
            part = of_x @ w[0]
            found[0] = part if found[0] is None else found[0] + part
        found.append(of_x.t() @ layer.input if wanted[0] else None)
        found.append(_in_order(of_h.t() @ previous[d], s) if wanted[1] else None)
        found.append(of_x.sum(0) if wanted[2] else None)
        found.append(_in_order(of_h.sum(0), s) if wanted[3] else None)
        if layer.projected:
            found.append(None)
            if wanted[4]:
                assert gates is not None
                assert extra is not None
                assert grad_hidden is not None
                o = gates.view(s.D, s.rows, 4, s.H)[d, :, 3]
                cell_output = o * extra.view(s.D, s.rows, s.H)[d].tanh()
                found[-1] = grad_hidden[d].t() @ cell_output.to(layer.dtype)
    if found[0] is not None:
        found[0] = found[0].view(input.shape)
    return tuple(found)


def _in_order(grad: Tensor, sizes: _Sizes) -> Tensor:
    """Rows of the gradient of weight_hh or bias_hh in the order of the gates."""
    return grad if sizes.E == sizes.G else grad.roll(-sizes.H, 0)


def _gates_again(
    cell: str, layer: _Layer, previous: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(gates, extra) as `forward` would have saved them, from h before each step (and LSTM's c)."""
    found, a_hn = [], []
    for d, w in enumerate(layer.weights):
        x, h = linear(layer.input, w[0], w[2]), linear(previous[d], w[1], w[3])
        if cell == "lstm":
            i, f, g, o = (x + h).chunk(4, 1)
            found.append(torch.cat([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1))
        elif cell == "gru":
            r, z = (x + h)[:, : 2 * layer.sizes.H].sigmoid().chunk(2, 1)
            a_hn.append(h[:, 2 * layer.sizes.H :])
            n = (x[:, 2 * layer.sizes.H :] + r * a_hn[-1]).tanh()
            found.append(torch.cat([r, z, n], 1))
        else:
            found.append((x + h).relu() if cell == "rnn_relu" else (x + h).tanh())
    if a_hn:
        extra = torch.stack(a_hn).to(layer.acc)
    return torch.stack(found), extra
