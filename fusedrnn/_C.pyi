"""The compiled kernels, over addresses; csrc/sequence.h says what each points to."""

from collections.abc import Sequence

def isa() -> str: ...
def forward_f32(
    cell: int,
    T: int,
    B: int,
    I: int,
    H: int,
    D: int,
    num_threads: int,
    save: bool,
    input: int,
    input_stride_t: int,
    input_stride_b: int,
    weights: Sequence[int],  # 8: weight_ih, weight_hh, bias_ih, bias_hh of each direction
    gates_h: int,
    gates: int,
    extra: int,
    h0: int,
    c0: int,
    output: int,
    h_n: int,
    c_n: int,
    /,
) -> None: ...

forward_f64 = forward_f32

def backward_f32(
    cell: int,
    T: int,
    B: int,
    I: int,
    H: int,
    D: int,
    num_threads: int,
    gates: int,
    extra: int,
    input: int,
    weights: Sequence[int],  # 8, as forward's; biases are not read
    h0: int,
    c0: int,
    grad_output: int,
    grad_h_n: int,
    carry: int,
    grad_gates: int,
    grad_input: int,  # 0: not wanted
    grad_weights: Sequence[int],  # 8, as forward's; 0: not wanted
    /,
) -> None: ...

backward_f64 = backward_f32
