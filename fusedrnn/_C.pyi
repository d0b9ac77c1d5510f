"""The compiled kernels, from tensors to tensors; see ops.py, and csrc/bindings.cpp."""

from collections.abc import Callable, Sequence
from types import NotImplementedType

from torch import Tensor

from fusedrnn.ops import Options, Tensors, Weights

compiler: str  # that built this file
isas: str  # that it has kernels for, best first: "amx, avx512_bf16, ..., generic"
cuda: str  # CUDA architectures, likewise
cuda_version: str  # of the nvcc that built them; there with them only

class Panels:
    calls: int  # that have used them

def isa() -> str: ...
def float32_precision() -> str: ...
def has_precision(word: str, /) -> bool: ...
def release_memory() -> None: ...
def release_threads() -> None: ...
def takes(
    cell: int, input: Tensor, initial: Tensors, weights: Weights, options: Options | None, /
) -> bool: ...
def plan(
    cell: int,
    num_threads: int,
    precision: str,
    given: bool,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None,
    /,
) -> tuple[int, int, int, bool, int, str] | None: ...
def forward(
    cell: int,
    save: bool,
    num_threads: int,
    precision: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None,
    panels: Panels | None,
    /,
) -> tuple[tuple[Tensor, ...], Tensor | None] | NotImplementedType | None: ...
def plain(
    cell: int,
    one_step: bool,
    batch_first: bool,
    sizes: tuple[int, int, int, int],
    parameters: dict[str, Tensor | None],
    names: Sequence[str],
    flat: Sequence[Tensor | None] | None,
    input: Tensor,
    hx: object,
    panels: Callable[[int, Weights], Panels | None] | None,
    /,
) -> tuple[Tensor, ...] | None: ...
def watched() -> bool: ...
def pack(cell: int, precision: str, input: Tensor, weights: Weights, /) -> Panels | None: ...
def backward(
    cell: int,
    num_threads: int,
    precision: str,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None,
    saved: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    groups: int,
    /,
) -> tuple[Tensor | None, ...] | NotImplementedType | None: ...

class CudaLayer:
    """One layer's shape, sequences, device and stream; csrc/cuda/kernels.h has every argument.

    Only in a build with CUDA kernels. Addresses are integers, 0 for null. RuntimeError for an error
    of CUDA's.
    """

    def __init__(
        self,
        *,
        cell: int,
        number: int,
        T: int,
        B: int,
        H: int,
        P: int,
        D: int,
        offsets: int,
        device_offsets: int,
        reset: int,
        reset_to_initial: bool,
        device: int,
        stream: int,
    ) -> None: ...
    def forward(
        self,
        *,
        block: bool,
        workspace: int,
        gates_x: list[int],
        weight_hh: list[int],
        bias_hh: list[int],
        weight_hr: list[int],
        h0: int,
        c0: int,
        gates: int,
        extra: int,
        every_cell: bool,
        unprojected: int,
        hidden: int,
        output: int,
        h_n: int,
        c_n: int,
    ) -> None: ...
    def backward(
        self,
        *,
        block: bool,
        workspace: int,
        weight_hh: list[int],
        weight_hr: list[int],
        gates: int,
        extra: int,
        previous: int,
        c0: int,
        grad_output: int,
        grad_h_n: int,
        grad_c_n: int,
        grad_cells: int,
        grad_gates: int,
        grad_hidden: int,
        carry: int,
        grad_h0: int,
        grad_c0: int,
    ) -> None: ...
    def previous(self, *, gates: int, extra: int, hidden: int, h0: int, previous: int) -> None: ...
    def workspace_bytes(self, projected: bool, /) -> int: ...
    def block_ctas(self, backward: bool, /) -> int: ...
