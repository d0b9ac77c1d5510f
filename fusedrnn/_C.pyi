"""The compiled kernels, from tensors to tensors; see ops.py, and csrc/bindings.cpp."""

from types import NotImplementedType

from torch import Tensor

from fusedrnn.ops import Tensors, Weights

def isa() -> str: ...
def release_threads() -> None: ...
def takes(cell: int, input: Tensor, initial: Tensors, weights: Weights, /) -> bool: ...
def plan(
    cell: int, num_threads: int, input: Tensor, initial: Tensors, weights: Weights, /
) -> tuple[int, int, int, bool, int] | None: ...
def forward(
    cell: int,
    save: bool,
    num_threads: int,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    /,
) -> tuple[tuple[Tensor, ...], Tensor | None] | NotImplementedType | None: ...
def backward(
    cell: int,
    num_threads: int,
    input: Tensor,
    initial: Tensors,
    weights: Weights,
    saved: Tensor,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    groups: int,
    /,
) -> tuple[Tensor | None, ...] | NotImplementedType | None: ...
