"""The compiled kernels, from tensors to tensors; see ops.py, and csrc/bindings.cpp."""

from types import NotImplementedType

from torch import Tensor

from fusedrnn.ops import Options, Tensors, Weights

compiler: str  # that built this file
isas: str  # that it has kernels for, best first: "avx512, avx2, generic"
cuda: str  # CUDA architectures, likewise

def isa() -> str: ...
def release_threads() -> None: ...
def takes(
    cell: int, input: Tensor, initial: Tensors, weights: Weights, options: Options | None, /
) -> bool: ...
def plan(
    cell: int,
    num_threads: int,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None,
    /,
) -> tuple[int, int, int, bool, int] | None: ...
def forward(
    cell: int,
    save: bool,
    num_threads: int,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    options: Options | None,
    /,
) -> tuple[tuple[Tensor, ...], Tensor | None] | NotImplementedType | None: ...
def backward(
    cell: int,
    num_threads: int,
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
