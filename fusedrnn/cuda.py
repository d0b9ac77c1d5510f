"""One layer on a CUDA device: what ops.py's forward and backward are on a CPU.

Torch computes the products with all time steps at once, before and after the recurrence, and
csrc/cuda/ the recurrence: csrc/cuda/kernels.h has the contract. Here are the checks that it relies
on, the memory, and the choice between the paths. One step alone (input [B, I]) is torch's.

float32 products with the recurrent weights are TF32 where torch allows it to recurrent layers
(torch.backends.cudnn.rnn.fp32_precision, or allow_tf32); those outside the recurrence follow the
setting of torch's matrix products.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import NotImplementedType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.nn import Parameter
from torch.nn.functional import linear

from . import ops  # isort: skip, it has the words for a missing extension
import fusedrnn._C as _C  # isort: skip

_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 3, torch.float16: 4}
_TF32 = 2  # the one of csrc/cuda/kernels.h that is no dtype

# "step", "block" or "torch" instead of the table's choice: for tests.
forced = os.environ.get("FUSEDRNN_KERNEL", "")
if forced not in ("", "step", "block", "torch"):
    raise RuntimeError(f"FUSEDRNN_KERNEL must be step, block or torch, got {forced!r}")


@cache
def unavailable(device: torch.device) -> str | None:
    """Why this build has no CUDA kernels for the device, whose calls are torch's then; None if it
    has. A GPU of sm_80 or later that was left out of the build is an error of the call instead."""
    if torch.version.hip is not None:
        return "the CUDA kernels are for NVIDIA's GPUs"
    if not hasattr(_C, "CudaLayer"):
        return "this build has no CUDA kernels"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the CUDA kernels are for sm_80 and later"
    # 12080 is CUDA 12.8. A driver runs what any CUDA of its major version, or an older one, built.
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # of CUDA builds
    if driver // 1000 < int(_C.cuda_version.partition(".")[0]):
        return (
            f"the CUDA kernels were built with CUDA {_C.cuda_version}, and the driver is for "
            f"{driver // 1000}.{driver % 1000 // 10}: update it, or rebuild with an older nvcc "
            "(CUDACXX names it)"
        )
    return None


def available(device: torch.device) -> bool:
    """Whether CUDA kernels can compute calls there."""
    return unavailable(device) is None


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
        input.is_cuda and _fits(cell, input, initial, weights, options) and available(input.device)
    )


def _fits(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None,
) -> bool:
    if forced == "torch":
        return False
    if not all(t is None or _is_ordinary(t, input) for t in (input, *initial, *weights)):
        return False
    packed = options is not None and options.batch_sizes is not None
    if input.dtype not in _NUMBERS or not input.shape[0] or (input.dim() != 3 and not packed):
        return False
    try:
        ops.check_layer(cell, input, initial, weights, options)
    except RuntimeError:
        return False
    return packed or bool(input.shape[1])


def _is_ordinary(tensor: Tensor, input: Tensor) -> bool:
    """Whether it is dense memory of input's dtype and device, and no more than that."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and tensor.device == input.device
        and tensor.dtype == input.dtype
        and not tensor.is_neg()
        and not is_batchedtensor(tensor)
        and not is_legacy_batchedtensor(tensor)
    )


class _Call(NamedTuple):
    """What the table decides by."""

    cell: str
    dtype: torch.dtype
    device: torch.device
    B: int
    I: int  # noqa: E741
    H: int
    D: int
    alone: bool  # torch.nn could compute it too: a module of one layer, without options
    # CTAs that the device runs at once; 0 where the block path is not for it.
    block_ctas: Callable[[], int]


class Rule(NamedTuple):
    """A line of the table: what computes a call, where it applies."""

    path: str
    why: str
    applies: Callable[[_Call], bool]


def _cudnn_is_persistent(call: _Call) -> bool:
    """Where torch takes cuDNN's persistent kernel for large layers: torch's own rule for that."""
    return (
        call.alone
        and call.dtype is torch.float16
        and call.D == 1
        and call.cell != "gru"
        and call.H % 128 == 0
        and 128 < call.H <= 1024  # the block path has those of 128
        and call.I % 128 == 0
        and call.B % 8 == 0
        and call.B <= 128
        and not (call.cell.startswith("rnn") and call.B >= 96 and call.H >= 896)
        and _is_large(call.device)
    )


def _is_large(device: torch.device) -> bool:
    found = torch.cuda.get_device_properties(device)
    return found.major >= 8 and found.minor != 6 and found.multi_processor_count >= 98


def _fits_block(call: _Call) -> bool:
    # Each CTA takes 8 rows, and all steps. In more than two rounds of CTAs the step path's wider
    # tiles should win: an estimate, measured on no GPU.
    return 2 * call.block_ctas() >= -(-call.B // 8) * call.D


# The first line that applies. Clusters and grids of CTAs that hold the weights together will stand
# before "step".
TABLE = (
    # On an H100 it is published to take 2.0 us a step at (B, H) = (16, 768), where one launch after
    # another alone takes 2.7.
    Rule("torch", "cuDNN has a persistent kernel for it, known to be faster", _cudnn_is_persistent),
    Rule(
        "block",
        "one launch for all steps, each CTA with all recurrent weights in its registers and shared "
        "memory and 8 sequences of its own",
        _fits_block,
    ),
    Rule(
        "step",
        "one launch a step, the gates in the epilogue of the recurrent product",
        lambda call: True,
    ),
)


def choice(
    cell: str,
    input: Tensor,
    initial: ops.Tensors,
    weights: ops.Weights,
    options: ops.Options | None = None,
    alone: bool = False,
) -> Rule | None:
    """The table's line for a layer; None if not `takes`. `alone`: it is a module's only one."""
    if not takes(cell, input, initial, weights, options):
        return None
    return _Layer(cell, input, initial, weights, options).choice(alone and options is None)


def cudnn_takes(training: bool) -> bool:
    """Whether torch would call cuDNN, and that can do what follows: its layers have a backward pass
    in training mode only. Double backward they never have."""
    return torch.backends.cudnn.enabled and (training or not torch.is_grad_enabled())


def torch_is_faster(cell: str, dtype: torch.dtype, input: Tensor, weights: ops.Weights) -> bool:
    """Whether the table says torch for a module's only layer, of input [T, B, I], in `dtype`."""
    weight_hh = weights[1]
    if forced or weight_hh is None or ops.weights_per_direction(weights) == 5:
        return False
    batch, features = input.shape[1:]
    hidden, directions = weight_hh.shape[0] // ops.CELLS[cell].gates, len(weights) // 4
    call = _Call(
        cell, dtype, input.device, batch, features, hidden, directions, True, block_ctas=lambda: 0
    )
    return any(r.path == "torch" and r.applies(call) for r in TABLE)


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
        self.name, self.cell = cell, ops.CELLS[cell]
        self.options = options or ops.Options()
        self.dtype, self.device = input.dtype, input.device
        self.acc = torch.promote_types(input.dtype, torch.float32)
        each = ops.weights_per_direction(weights)
        self.weights = [_padded(weights[i : i + each]) for i in range(0, len(weights), each)]
        self.projected = each == 5
        gates = self.cell.gates
        hidden, size = self.weights[0][1].shape[0] // gates, self.weights[0][1].shape[1]
        # Kept here, as is all that the kernels get an address of.
        self.offsets = self.device_offsets = None
        if self.options.batch_sizes is not None:
            sizes = self.options.batch_sizes.cpu()
            T, B, rows = len(sizes), int(sizes[0]), input.shape[0]
            self.offsets = torch.zeros(T + 1, dtype=torch.int64)
            torch.cumsum(sizes, 0, out=self.offsets[1:])
            self.device_offsets = self.empty(T + 1, dtype=torch.int64)
        else:
            T, B = input.shape[:2]
            rows = T * B
        gradients = gates + (cell == "gru")
        self.sizes = _Sizes(T, B, rows, hidden, size, len(self.weights), gates, gradients)
        self.input = input.reshape(rows, input.shape[-1])
        self.initial = [_aligned(s.contiguous()) for s in initial]
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
            offsets=0 if self.offsets is None else self.offsets.data_ptr(),
            device_offsets=_address(self.device_offsets),
            reset=_address(self.reset),
            reset_to_initial=self.options.reset_to_initial,
            device=input.device.index or 0,
            stream=torch.cuda.current_stream(input.device).cuda_stream if input.is_cuda else 0,
        )

    def addresses(self, which: int) -> list[int]:
        """Of weights[which] of both directions."""
        return _addresses([w[which] for w in self.weights])

    def workspace(self) -> Tensor:
        return self.empty(self.kernels.workspace_bytes(self.projected), dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.acc, device=self.device)

    def state(self, i: int) -> Tensor | None:
        return self.initial[i] if i < len(self.initial) else None

    def block_ctas(self, backward: bool) -> int:
        """CTAs of the block path that the device runs at once; 0 if it is not for this layer."""
        return 0 if self.projected else self.kernels.block_ctas(backward)

    def choice(self, alone: bool = False) -> Rule:
        s, ctas = self.sizes, partial(self.block_ctas, False)
        if forced == "block" and not ctas():
            raise RuntimeError(
                f"FUSEDRNN_KERNEL=block: there is none for H = {s.H}, P = {s.P} in "
                f"{_name(self.dtype)} on this GPU"
            )
        alone = alone and not self.projected
        features = self.input.shape[1]
        call = _Call(self.name, self.dtype, self.device, s.B, features, s.H, s.D, alone, ctas)
        return next(r for r in TABLE if (r.path == forced if forced else r.applies(call)))

    def block(self, backward: bool) -> bool:
        """Whether by the block path; else by the step path. A layer may fit it forward only."""
        return self.choice().path == "block" and self.block_ctas(backward) > 0

    def saved_parts(self) -> tuple[int, int, int]:
        """How many numbers of the layer's dtype hold extra (itself in `acc`), gates and hidden."""
        s, recompute = self.sizes, self.options.recompute
        each = s.D * s.rows
        words = self.acc.itemsize // self.dtype.itemsize
        lstm = self.cell.states == 2
        extra = each * s.H * words if self.cell.extra and (lstm or not recompute) else 0
        gates = 0 if recompute else each * s.H * s.G
        return extra, gates, each * s.P if self.projected or recompute else 0

    def split(self, saved: Tensor) -> list[Tensor | None]:
        """[extra, gates, hidden] of the memory that saves them; None for those of no numbers."""
        words = self.acc.itemsize // self.dtype.itemsize
        if saved.storage_offset() % words:  # it may have passed a user's saved_tensors_hooks
            saved = saved.clone()
        extra, gates, hidden = torch.split(saved, [*self.saved_parts()])
        parts = extra.view(self.acc), gates, hidden
        return [p if p.numel() else None for p in parts]


def _aligned(state: Tensor) -> Tensor:
    """Where the kernels can load 16 bytes at once, as in memory of its own: it may be a view."""
    return state.clone() if state.data_ptr() % 16 else state


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


def _addresses(of_directions: Sequence[Tensor | None]) -> list[int]:
    """Two, also of one direction."""
    return [*map(_address, of_directions), 0][:2]


def _tf32() -> bool:
    """Whether torch allows TF32 to recurrent layers, and the user to all libraries."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    # From torch 2.9 on; before, cudnn.rnn is a module without it, or not imported yet.
    precision = getattr(getattr(torch.backends.cudnn, "rnn", None), "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
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
    saved = layer.empty(sum(layer.saved_parts())) if save else None
    extra, gates, hidden = (None,) * 3 if saved is None else layer.split(saved)
    block = layer.block(False)
    if lstm and extra is None and (cells or not block):
        extra = layer.empty(s.D, s.rows if cells else s.B, s.H, dtype=layer.acc)
    packed = layer.offsets is not None
    output = layer.empty(*((s.rows,) if packed else (s.T, s.B)), s.D * s.P)
    h_n = layer.empty(s.D, s.B, s.P)
    c_n = layer.empty(s.D, s.B, s.H) if lstm else None
    unprojected = layer.empty(s.D, s.B, s.H) if layer.projected else None
    workspace = layer.workspace()
    layer.kernels.forward(
        block=block,
        workspace=_address(workspace),
        gates_x=_addresses(gates_x),
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
        every = extra.view(s.D, *output.shape[:-1], s.H).movedim(0, -2).flatten(-2)
        results.append(every.to(layer.dtype, copy=True))  # no view of what is saved
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
    if groups or not all(g is None or _is_ordinary(g, input) for g in grads):
        return NotImplemented  # type: ignore[no-any-return]
    layer = _Layer(cell, input, initial, weights, options)
    s = layer.sizes
    if saved.dtype != layer.dtype or saved.device != layer.device or saved.dim() != 1:
        return None
    if len(saved) != sum(layer.saved_parts()):
        return None
    saved = saved.contiguous()
    extra, gates, hidden = layer.split(saved)
    h0, c0 = layer.state(0), layer.state(1)
    lstm = layer.cell.states == 2
    each = 5 if layer.projected else 4
    wanted = [needed[i : i + each] for i in range(1 + len(initial), len(needed), each)]
    previous = None
    if gates is None or layer.name == "gru" or any(w[1] for w in wanted):
        previous = layer.empty(s.D, s.rows, s.P)
        layer.kernels.previous(
            gates=_address(gates),
            extra=_address(extra),
            hidden=_address(hidden),
            h0=_address(h0),
            previous=_address(previous),
        )
    if gates is None:
        assert previous is not None
        gates, extra = _gates_again(layer, previous, extra)
    dense = [g if g is None else g.contiguous() for g in grads]
    dense += [None] * (4 - len(dense))
    grad_gates = layer.empty(s.D, s.rows, s.E * s.H)
    grad_hidden = layer.empty(s.D, s.rows, s.P) if layer.projected else None
    block = layer.block(True)
    carry = layer.empty(s.D, s.B, s.H, dtype=layer.acc) if layer.cell.extra and not block else None
    grad_h0 = layer.zeros(s.D, s.B, s.P) if initial and needed[1] else None
    grad_c0 = layer.zeros(s.D, s.B, s.H) if lstm and initial and needed[2] else None
    workspace = layer.workspace()
    layer.kernels.backward(
        block=block,
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
    for d, (w, of) in enumerate(zip(layer.weights, wanted, strict=True)):
        # GRU's: of n's recurrent part, r, z, n's other part; so the first three are weight_hh's,
        # rotated, and the last three weight_ih's.
        of_x = grad_gates[d][:, (s.E - s.G) * s.H :]
        of_h = grad_gates[d][:, : s.G * s.H]
        if needed[0]:
            part = of_x @ w[0]
            found[0] = part if found[0] is None else found[0] + part
        found.append(of_x.t() @ layer.input if of[0] else None)
        found.append(None)
        if of[1]:
            assert previous is not None
            found[-1] = _in_order(of_h.t() @ previous[d], s)
        found.append(of_x.sum(0) if of[2] else None)
        found.append(_in_order(of_h.sum(0), s) if of[3] else None)
        if layer.projected:
            found.append(None)
            if of[4]:
                assert gates is not None
                assert extra is not None
                assert grad_hidden is not None
                o = _saved_sigmoid(gates.view(s.D, s.rows, 4, s.H)[d, :, 3])
                cell_output = o * extra.view(s.D, s.rows, s.H)[d].tanh()
                found[-1] = grad_hidden[d].t() @ cell_output.to(layer.dtype)
    if found[0] is not None:
        found[0] = found[0].view(input.shape)
    return tuple(found)


def _in_order(grad: Tensor, sizes: _Sizes) -> Tensor:
    """Rows of the gradient of weight_hh or bias_hh in the order of the gates."""
    return grad if sizes.E == sizes.G else grad.roll(-sizes.H, 0)


def _gates_again(
    layer: _Layer, previous: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(gates, extra) as `forward` would have saved them, from h before each step (and LSTM's c)."""
    H, found, a_hn = layer.sizes.H, [], []
    sigmoid = partial(_sigmoid, dtype=layer.dtype)
    for d, w in enumerate(layer.weights):
        x, h = linear(layer.input, w[0], w[2]), linear(previous[d], w[1], w[3])
        x, h = x.to(layer.acc), h.to(layer.acc)
        if layer.name == "lstm":
            i, f, g, o = (x + h).chunk(4, 1)
            gates = [sigmoid(i), sigmoid(f), g.tanh(), sigmoid(o)]
        elif layer.name == "gru":
            r, z = (x + h)[:, : 2 * H].chunk(2, 1)
            a_hn.append(h[:, 2 * H :])
            n = (x[:, 2 * H :] + r.sigmoid() * a_hn[-1]).tanh()
            gates = [sigmoid(r), sigmoid(z), n]
        else:
            gates = [(x + h).relu() if layer.name == "rnn_relu" else (x + h).tanh()]
        found.append(torch.cat(gates, 1).to(layer.dtype))
    return torch.stack(found), torch.stack(a_hn) if a_hn else extra


# In types of 16 bits a sigmoid above 1/2 is saved less 1; gate_to_save in csrc/cuda/layer.cuh says
# why. The caller rounds.


def _sigmoid(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize > 2:
        return x.sigmoid()
    return torch.where(x > 0, -((-x).sigmoid()), x.sigmoid())


def _saved_sigmoid(gate: Tensor) -> Tensor:
    if gate.dtype.itemsize > 2:
        return gate
    return torch.where(gate.signbit(), 1 + gate.float(), gate.float())
