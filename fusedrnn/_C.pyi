"""The compiled kernels, over addresses (csrc/bindings.cpp); csrc/sequence.h says what each points to."""

def isa() -> str: ...
def forward_f32(
    cell: int,
    T: int,
    B: int,
    H: int,
    D: int,
    num_threads: int,
    save: bool,
    gates: int,
    extra: int,
    weight_hh: int,
    weight_hh_reverse: int,
    bias_hh: int,
    bias_hh_reverse: int,
    gates_h: int,
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
    H: int,
    D: int,
    num_threads: int,
    gates: int,
    extra: int,
    weight_hh: int,
    weight_hh_reverse: int,
    h0: int,
    c0: int,
    grad_output: int,
    grad_h_n: int,
    carry: int,
    grad_gates: int,
    h_prev: int,
    /,
) -> None: ...

backward_f64 = backward_f32
