"""What fusedrnn takes turns with beside torch.nn: the reference's Python loop, torch.compile of
torch.nn's modules, and onnxruntime. Each is made of a torch.nn case, and shares its parameters.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fusedrnn import reference

from . import common

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# ONNX's order of the gates, as indices into torch's: i f g o to i o f g, and r z n to z r n.
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
UNROLLED = 10  # torch.compile writes out every step of a sequence; more take minutes to compile


class Unavailable(Exception):
    """Why a peer has no time in a row."""


class Peer(Protocol):
    """What common.Case has."""

    def call(self, mode: str) -> Callable[[], Any]: ...

    def values(self, mode: str) -> list[Tensor]: ...


class Loop(nn.Module):
    """torch.nn's module, computed by fusedrnn/reference.py."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        kind = type(module).__name__.removesuffix("Cell")
        self.cell = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[kind]

    def forward(self, input: Tensor, hx: Any = None) -> Sequence[Tensor]:
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        weights = list(self.module.parameters())
        if not isinstance(self.module, nn.RNNCellBase):
            return reference.scan(self.cell, input, states, weights)
        states = tuple(s[None] for s in states)
        _, *final = reference.scan(self.cell, input[None], states, weights)
        return [s[0] for s in final]


def loop(case: common.Case, mode: str, threads: int) -> Peer:
    return _with_module(case, Loop(case.module))


def compiled(case: common.Case, mode: str, threads: int) -> Peer:
    """Compiles at once. Unavailable if that fails, or if torch leaves the module to eager mode.

    It does so with LSTM, GRU and RNN unless its experimental allow_rnn is set, as it is here for
    sequences of up to UNROLLED steps.
    """
    twin = _with_module(case, torch.compile(case.module))
    sequence = isinstance(case.module, nn.RNNBase)
    torch._dynamo.reset()
    counters.clear()
    unrolls = sequence and case.input.shape[0] <= UNROLLED
    no_workers = torch._inductor.config.patch(compile_threads=1)  # they would stay, beside timings
    with no_workers, torch._dynamo.config.patch(allow_rnn=unrolls), common.grad_mode(mode):
        try:
            twin.call(mode)()
        except Exception as error:  # whatever a compiler raises
            cause = getattr(error, "inner_exception", error)  # in dynamo's own exceptions
            raise Unavailable(f"fails: {error_line(cause)}") from error
    if not counters["stats"]["unique_graphs"]:
        raise Unavailable(f"leaves {type(case.module).__name__} to eager mode")
    return twin


def _with_module(case: common.Case, module: Any) -> common.Case:
    twin = copy.copy(case)
    twin.module = module
    return twin


class Onnx:
    """A case's forward pass as one ONNX node, run by onnxruntime."""

    def __init__(self, case: common.Case, mode: str, threads: int) -> None:
        import onnx
        import onnxruntime

        cell = type(case.module).__name__
        weight_ih, weight_hh, bias_ih, bias_hh = (
            torch.cat([p.detach().chunk(GATES[cell])[gate] for gate in ONNX_GATES[cell]])
            for p in case.module.parameters()
        )
        weights = {"W": weight_ih, "R": weight_hh, "B": torch.cat((bias_ih, bias_hh))}
        self.names = ["Y", "Y_h", "Y_c"][: 3 if cell == "LSTM" else 2]
        attributes: dict[str, Any] = {"hidden_size": weight_hh.shape[1]}
        if cell == "GRU":  # torch's GRU, where r scales a product and not h
            attributes["linear_before_reset"] = 1
        float32 = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(cell, ["X", *weights], self.names, **attributes)],
            cell,
            [onnx.helper.make_tensor_value_info("X", float32, case.input.shape)],
            [onnx.helper.make_tensor_value_info(name, float32, None) for name in self.names],
            [onnx.numpy_helper.from_array(w.numpy()[None], name) for name, w in weights.items()],
        )
        opset = onnx.helper.make_opsetid("", 14)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else its threads go on spinning after a call, on a core that the other side's turn needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.input = case.input

    def call(self, mode: str) -> Callable[[], list[Any]]:
        feed = {"X": self.input.detach().numpy()}
        return lambda: self.session.run(self.names, feed)

    def values(self, mode: str) -> list[Tensor]:
        output, *finals = (torch.from_numpy(array) for array in self.call(mode)())
        return [output[:, 0], *finals]  # Y is [T, directions, B, H]


PEERS: dict[str, Callable[[common.Case, str, int], Peer]] = {
    "loop": loop,
    "torch.compile": compiled,
    "onnxruntime": Onnx,
}


def applies(name: str, cell: str, dtype: str, mode: str) -> bool:
    """onnxruntime has no backward pass, its LSTM, GRU and RNN are float32, and it has no cells."""
    return name != "onnxruntime" or (
        mode == "no_grad" and dtype == "float32" and not cell.endswith("Cell")
    )


def missing() -> dict[str, str]:
    """The peers that no row can have, and why."""
    found = {}
    needed = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if needed:
        found["onnxruntime"] = f"not installed: pip install {' '.join(needed)}"
    if not torch.cuda.is_available():
        found["cuDNN"] = "no CUDA GPU was found"
    return found


def check(peer: Peer, mode: str, expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raises RuntimeError unless results and gradients are near what float64 gives.

    The bound is far above roundings, which are not ours to judge; a wrong graph is far off.
    """
    bound = torch.finfo(dtype).eps ** 0.5
    for i, (value, right) in enumerate(zip(peer.values(mode), expected, strict=False)):
        error = ((value - right).abs().max() / right.abs().max()).item()
        if not error <= bound:
            raise RuntimeError(
                f"tensor {i} of results and gradients is off by {error:.1e}, more than {bound:.1e}"
            )


def error_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
