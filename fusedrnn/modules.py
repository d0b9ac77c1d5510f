"""The modules: torch.nn's LSTM, GRU, RNN and their cells with another forward.

Constructor, parameters, state_dict, repr and pickling are torch's own. What is here is the walk
over layers and directions, dropout between layers, and the choice between the kernels and torch's
own implementation, which takes every call that the kernels do not: other dtypes and devices,
tracing, export, and every wrong call, so that each error is torch's. What torch has not (lengths,
reset_mask, return_cell_states) is computed by functional.py, kernel or not.
There is no math here; that begins in functional.py.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from types import NoneType
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch._compile import _disable_dynamo
from torch.compiler import is_compiling, is_exporting
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack  # which torch has

from . import cuda, library, ops, prepacking
from .extensions import States, extended, is_jagged, zero_states
from .functional import (
    autocast_dtype,
    autocast_layer,
    graph_layer,
    kernel_layer,
    other_layer,
)
from .functional import layer as functional_layer


def _compute(
    features: int,
    hidden: int,
    cell: str,
    input: Tensor,
    initial: States,
    weights: ops.Weights,
    options: ops.Options | None = None,
    panels: Any = None,
) -> tuple[Tensor, ...] | None:
    """One layer, or step, by functional.py. None: the call is torch's own implementation's.

    RuntimeError if the weights are not those of `features` and `hidden`: torch may compute
    something from them.
    """
    results = kernel_layer(cell, input, initial, weights, options, panels)
    if results is not None:
        return results
    if not ops.watched() or ops.only_autocast():
        ordinary = options is None and ops.weights_per_direction(weights) == 4
        if ops.watched() and not (ordinary and _torch_is_faster(cell, hidden, input)):
            results = autocast_layer(cell, input, initial, weights, options, panels)
        if results is None:
            ops.check_weights(cell, features, hidden, weights)
        return results
    # Under torch.func and forward-mode AD: torch's fused operations lack the rules for them.
    if not ops.transformed():
        return None
    tensors = (input, *initial, *weights)
    converts = autocast_dtype(cell, input, initial, weights, options) is not None
    if not converts and any(t is not None and t.dtype != input.dtype for t in tensors):
        return None
    try:
        ops.check_layer(cell, input, initial, weights, options)
    except RuntimeError:
        return None  # torch has the error for it
    ops.log.debug("%s layer: not torch's, as torch.func or forward-mode AD is active", cell)
    return other_layer(cell, input, initial, weights, options)


def _compute_in_graph(
    features: int,
    hidden: int,
    cell: str,
    input: Tensor,
    initial: States,
    weights: ops.Weights,
    options: ops.Options | None = None,
    panels: None = None,
) -> tuple[Tensor, ...]:
    """`_compute` while torch.compile builds a graph: one operator of library.py.

    RuntimeError where that cannot be: the eager call has the right one.
    """
    ops.check_weights(cell, features, hidden, weights)
    results = graph_layer(cell, input, initial, weights, options)
    if results is None:
        raise RuntimeError("no tensors for a graph")
    return results


# Whether torch multiplies bfloat16 by an instruction that the kernels do not use.
_TORCH_MULTIPLIES_FASTER = torch._C._has_mkldnn and any(
    getattr(torch.cpu, f"_is_{name}_supported", bool)()
    for name, used in (("amx_tile", ops.isa() == "amx"), ("avx512_bf16", ops.BF16_PRODUCTS))
    if not used
)


def _torch_is_faster(cell: str, hidden: int, input: Tensor) -> bool:
    """Whether torch's layer would compute [T, B, I] in bfloat16, and faster than ours.

    On a CPU with AMX it can be, whose tiles our kernels use only if FUSEDRNN_ISA says so. The
    thresholds are from a Zen 4 core and kernels that multiplied in float32. torch.nn's time over
    theirs, no_grad / training, at (B, H): LSTM (1, 32) 3.2 / 3.1, (1, 128) 1.0 / 1.9,
    (1, 512) 0.8 / 2.5, (8, 128) 0.6 / 0.8, (64, 512) 0.5 / 0.7. GRU (8, 128) 2.9 / 4.5,
    (8, 256) 1.4 / 2.0, (32, 256) 0.9 / 0.9, (64, 512) 0.6 / 0.6; RNN (32, 256) 1.1 / 1.1,
    (64, 512) 0.7 / 0.7.
    """
    if not (_TORCH_MULTIPLIES_FASTER and torch.backends.mkldnn.enabled and input.is_cpu):
        return False
    if input.dim() != 3:
        return False
    if is_compiling() or ops.transformed():  # neither takes torch's
        return False
    if torch.is_autocast_enabled("cpu"):
        taken = input.dtype in (torch.float32, torch.bfloat16)
        bfloat16 = taken and torch.get_autocast_dtype("cpu") is torch.bfloat16
    else:
        bfloat16 = input.dtype is torch.bfloat16
    seq_len, batch = input.shape[:2]
    if not bfloat16 or seq_len == 1:
        return False
    if cell == "lstm":
        return batch > 1 or (hidden > 256 and not torch.is_grad_enabled())
    return batch >= 32 and hidden >= 256


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_RNN_CELLS = {"tanh": "rnn_tanh", "relu": "rnn_relu"}  # by nonlinearity


class _Fused:
    """What all six modules share: the short way to the kernels, and the way back to torch.nn."""

    _torch_class: ClassVar[Any]  # the class of torch.nn that this one stands for
    _num_states: ClassVar[int] = 1  # h, or h and c

    def _plain(
        self,
        cell: str,
        input: Any,
        hx: Any,
        names: Sequence[str] = _CELL_WEIGHTS,
        flat: Any = None,
        batch_first: bool = False,
        layers: int = 1,
        kinds: int = 4,
    ) -> Sequence[Tensor] | None:
        """The results of all layers, or of a step, in ops.plain's case; None in others. `flat`: the
        layers' list of weights, `kinds` of them for each direction."""
        if torch.is_grad_enabled():  # ops.plain would say it later: 1.01 of a small training's time
            return None
        panels: Any = partial(prepacking.panels, self, cell) if prepacking.active else None  # type: ignore[arg-type]
        module: Any = self
        sizes = module.input_size, module.hidden_size, layers, kinds
        parameters, step = module._parameters, flat is None
        return ops.plain(cell, step, batch_first, sizes, parameters, names, flat, input, hx, panels)

    def _torch_forward(self, input: Any, hx: Any) -> Any:
        """The call by torch's own implementation, with torch's own errors."""
        if isinstance(input, torch.fx.Proxy) or isinstance(hx, torch.fx.Proxy):
            # In a symbolic trace a call of this module, as the tracer makes it of torch.nn's.
            if self._forward_hooks or self._forward_pre_hooks:  # type: ignore[attr-defined]
                raise RuntimeError(
                    "torch.fx.symbolic_trace would run this module's forward hooks twice: trace "
                    "after fusedrnn.restore(model), and replace in the traced model"
                )
            tracer: Any = (input if isinstance(input, torch.fx.Proxy) else hx).tracer
            arguments = (input,) if hx is None else (input, hx)
            name = tracer.path_of_module(self)
            return tracer.create_proxy("call_module", name, arguments, {})
        try:
            result = self._torch_class.forward(self, input, hx)
        except RuntimeError as error:
            # torch names the dtypes only on some of its paths.
            states = hx if isinstance(hx, (tuple, list)) else (hx,)
            data = input.data if isinstance(input, PackedSequence) else input
            dtypes = {
                "input": {data.dtype},
                "hx": {s.dtype for s in states if isinstance(s, Tensor)},
                "weights": {p.dtype for p in self.parameters()},  # type: ignore[attr-defined]
            }
            if len(set().union(*dtypes.values())) == 1 or _is_any_autocast_enabled():
                raise
            got = "; ".join(f"{name} {', '.join(map(str, d))}" for name, d in dtypes.items() if d)
            raise RuntimeError(
                f"input, hx and weights must be of one dtype, got: {got}. "
                f"Convert with .to(dtype). ({error})"
            ) from error
        ops.count("torch")
        if ops.log.isEnabledFor(logging.DEBUG):
            from .explanation import explain  # which imports this file

            ops.log.debug("%s: %s", type(self).__name__, explain(self, input, hx))  # type: ignore[arg-type]
        return result

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script asks for this: it cannot compile our forward, but it can torch's. The
        # module that it compiles shares the parameters; torch puts it in this one's place. Not that
        # of a subclass's own forward or of parametrized weights: torch has the error for these.
        cls: Any = type(self)
        fused = next(c for c in cls.__mro__ if "_torch_class" in vars(c))
        if cls.forward is not fused.forward or is_parametrized(self):  # type: ignore[arg-type]
            return self  # type: ignore[return-value]
        warnings.warn(
            "torch.jit.script puts torch.nn's modules in the place of fusedrnn's in the model that "
            "it is given, not only in its result: script copy.deepcopy(model), or call "
            "fusedrnn.replace again afterwards",
            stacklevel=2,
        )
        module = self._torch_class.__new__(self._torch_class)
        module.__dict__.update(self.__dict__)
        return module  # type: ignore[no-any-return]


@_disable_dynamo
def _outside_graph(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(...) outside the graph that torch.compile is building, hence by the kernels.

    torch's own implementation inside a compiled graph drops the dropout between layers.
    """
    return forward(*args, **kwargs)


class _Keywords(TypedDict, total=False):
    """What forward takes beyond torch.nn's. Not its parameters: the exporter of ONNX files passes
    the defaults of all that it finds in a signature by position."""

    lengths: Tensor | Sequence[int] | None
    reset_mask: Tensor | None
    reset_to_hx: bool


class _LSTMKeywords(_Keywords, total=False):
    return_cell_states: bool


_KEYWORDS = set(_LSTMKeywords.__annotations__)


def _given(keywords: Any) -> dict[str, Any]:
    """Those that ask for something. TypeError for others than there are, ValueError for reset_to_hx
    without reset_mask."""
    if not keywords.keys() <= _KEYWORDS:
        raise TypeError(f"forward() got an unexpected keyword argument: {', '.join(keywords)}")
    given = {k: v for k, v in keywords.items() if v is not None and v is not False}
    if "reset_to_hx" in given and "reset_mask" not in given:
        raise ValueError("reset_to_hx says to which state reset_mask resets: give a reset_mask")
    return given


class _Layers(_Fused, nn.RNNBase):
    """What LSTM, GRU and RNN share: layers x directions over functional.py's layer."""

    # True: less memory between forward and backward, which computes the gates again (ops.Options).
    recompute_gates = False

    def _compiling(
        self, forward: Callable[..., Any], input: Any, hx: Any, given: dict[str, Any]
    ) -> Any:
        # An exported program keeps torch's own operation, as that of a torch.nn module does.
        if is_exporting():
            if given:
                raise RuntimeError(
                    f"an exported program holds torch's own operation, which has no {list(given)}; "
                    "export fusedrnn.functional.layer with ops.Options"
                )
            return self._torch_class.forward(self, input, hx)
        pair = self._num_states == 2 and isinstance(hx, (tuple, list))
        states: States = () if hx is None else tuple(hx) if pair else (hx,)
        fits = hx is None or len(states) == self._num_states
        packed, jagged = isinstance(input, PackedSequence), is_jagged(input)
        tensors = [t for t in input if t is not None] if packed else [input]
        if jagged:
            tensors = [input.values(), input.offsets()]
        tensors += [*states, *(getattr(self, name) for name in self._flat_weights_names)]
        tensors += [v for k, v in given.items() if k == "reset_mask" or isinstance(v, Tensor)]
        order = input.sorted_indices if packed else None
        sizes_read = jagged or "lengths" in given or (packed and hx is None and order is None)
        if (
            fits
            and library.fits_a_graph(tensors)
            and (not sizes_read or library.sizes_may_be_unknown())
        ):
            if packed and hx is None:
                # For all layers: a number that is read from a tensor twice is two to a graph.
                batch = int(input.batch_sizes[0]) if order is None else order.shape[0]
                states = zero_states(self, input.data, batch)
            kernels = partial(self._kernels, compute=_compute_in_graph)
            try:
                results = self._computed(kernels, input, states or None, given)
            except (RuntimeError, TypeError, ValueError):
                results = None
            if results is not None:
                output, *final = results
                final, cells = final[: self._num_states], final[self._num_states :]
                return output, tuple(final) if self._num_states == 2 else final[0], *cells
        return _outside_graph(forward, self, input, hx, **given)

    def _plain_layers(self, input: Any, hx: Any) -> Sequence[Tensor] | None:
        """(output, *final states) in ops.plain's case; None in others, which `_kernels` takes."""
        names = self._flat_weights_names
        kinds = (4 if self.bias else 2) + (self.proj_size > 0)
        layers = self.num_layers
        if len(names) != layers * (2 if self.bidirectional else 1) * kinds:
            return None
        if layers > 1 and self.dropout and self.training:
            return None
        if _TORCH_MULTIPLIES_FASTER and getattr(input, "dtype", None) is torch.bfloat16:
            return None
        cell = self.mode.lower()
        flat = self._flat_weights
        return self._plain(cell, input, hx, names, flat, self.batch_first, layers, kinds)

    def _computed(
        self,
        kernels: Callable[..., Any],
        input: Any,
        states: States | None,
        given: dict[str, Any],
    ) -> list[Any] | None:
        """[output, *final states, cells if wanted], or None where the call is torch's.

        `kernels` is self._kernels, as it is or for a graph.
        """
        if given or (type(input) is not Tensor and is_jagged(input)):
            return extended(self, kernels, input, states, **given)
        if isinstance(input, Tensor):
            return kernels(input, states or ())  # type: ignore[no-any-return]
        return self._packed(kernels, input, states or ())

    def _kernels(
        self,
        input: Any,
        states: States,
        options: ops.Options | None = None,
        own: bool = False,
        compute: Callable[..., Any] = _compute,
    ) -> list[Tensor] | None:
        """[output, *final states], or None where the call is torch's. No states: zeros.

        With options.batch_sizes the input is a PackedSequence's data. `own`: torch has no such
        call.
        """
        if self.recompute_gates:
            options = (options or ops.Options())._replace(recompute=True)
        weights = self._flat_weights
        # torch's check goes through nn.Module.__getattr__: 8 us a call where this takes 0.6.
        # Whatever differs here (functional_call, parametrizations, pruning, ...) is left to it.
        if compute is not _compute:  # Dynamo, which cannot trace that check
            weights = [getattr(self, name) for name in self._flat_weights_names]
        elif not all(map(is_, map(self._parameters.get, self._flat_weights_names), weights)):
            self._update_flat_weights()
            weights = self._flat_weights
        num_layers = self.num_layers
        num_directions = 2 if self.bidirectional else 1
        kinds = (4 if self.bias else 2) + (self.proj_size > 0)
        if NoneType in map(type, weights) or len(weights) != num_layers * num_directions * kinds:
            return None

        packed = options is not None and options.batch_sizes is not None
        batched = packed or input.dim() == 3
        if not batched:
            if any([t.dim() != 2 for t in (input, *states)]):
                return None
            input = input.unsqueeze(1)
            states = [s.unsqueeze(1) for s in states]
        elif self.batch_first and not packed:
            input = input.transpose(0, 1)
        if input.shape[-1] != self.input_size:
            return None
        cell = self.mode.lower()  # "lstm", "gru", "rnn_tanh", "rnn_relu"
        if (
            input.dtype is torch.bfloat16
            and options is None
            and not self.proj_size
            and _torch_is_faster(cell, self.hidden_size, input)
        ):
            return None
        if not self.bias:
            groups = zip(*[iter(weights)] * kinds, strict=True)
            weights = [w for ih, hh, *hr in groups for w in (ih, hh, None, None, *hr)]
        kept = compute is _compute and prepacking.active
        if num_layers == 1:
            arguments = (cell, input, states, weights, options)
            unwatched = input.is_cuda and (not ops.watched() or ops.only_autocast())
            may_be_torchs = options is None and compute is _compute
            if unwatched and may_be_torchs and cuda.cudnn_takes(self.training):
                dtype = autocast_dtype(cell, input, states, weights) or input.dtype
                if cuda.torch_is_faster(cell, dtype, input, weights):
                    return None
            panels = prepacking.panels(self, cell, 0, weights) if kept else None
            results = compute(self.input_size, self.hidden_size, *arguments, panels)
            if results is None:
                if not own:
                    return None
                results = functional_layer(*arguments)
            input, *final = results
        else:
            for state in states:
                if state.dim() != 3 or state.shape[0] != num_layers * num_directions:
                    return None
            dropout = self.dropout if self.training else 0.0
            per_layer = len(weights) // num_layers
            finals = []
            for layer in range(num_layers):
                if layer and dropout:
                    # torch's layout and call, hence its bits for the same seed.
                    input = torch.dropout(input, dropout, True)
                start = layer * num_directions
                arguments = (
                    cell,
                    input,
                    [s[start : start + num_directions] for s in states],
                    weights[layer * per_layer : (layer + 1) * per_layer],
                    options,
                )
                features = input.shape[-1] if layer else self.input_size
                panels = prepacking.panels(self, cell, layer, arguments[3]) if kept else None
                results = compute(features, self.hidden_size, *arguments, panels)
                if results is None and (layer or own):
                    # Not back to torch: dropout has drawn its random numbers.
                    results = functional_layer(*arguments)
                if results is None:
                    return None
                input, *final = results
                finals.append(final[: self._num_states])
            cells = final[self._num_states :]  # the last layer's
            final = [torch.cat(f) for f in zip(*finals, strict=True)] + cells
        if not batched:
            return [input.squeeze(1), *(f.squeeze(1) for f in final)]
        if self.batch_first and not packed:
            final[self._num_states :] = [c.transpose(0, 1) for c in final[self._num_states :]]
            return [input.transpose(0, 1), *final]
        return [input, *final]

    def _packed(self, kernels: Callable[..., Any], input: Any, states: States) -> list[Any] | None:
        """`_kernels` for a PackedSequence; output is one too. None for anything else."""
        if not isinstance(input, PackedSequence):
            return None
        data, batch_sizes, order, back = input
        if order is not None:
            if any(s.dim() != 3 or s.shape[1] != order.shape[0] for s in states):
                return None
            states = [s.index_select(1, order) for s in states]
        results = kernels(data, states, ops.Options(batch_sizes))
        if results is None:
            return None
        output, *final = results
        if back is not None:
            final = [s.index_select(1, back) for s in final]
        return [PackedSequence(output, batch_sizes, order, back), *final]


class LSTM(_Layers):
    """torch.nn.LSTM: same constructor, parameters, initial weights, results and errors.

    LSTM(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, proj_size=0, device=None, dtype=None)

    forward(input, hx=None) -> (output, (h_n, c_n)), with D = 2 if bidirectional else 1 and P =
    proj_size or hidden_size:
        input   [T, B, input_size], or [B, T, input_size] with batch_first, or [T, input_size], or
                a PackedSequence, or a jagged nested tensor [B, *, input_size]
        hx      (h_0, c_0), [D * num_layers, B, P] and [D * num_layers, B, hidden_size] (no B with a
                2-D input) and of the input's dtype and device; zeros if None
        output  [T, B, D * P] or as the input, h_n and c_n as h_0 and c_0

    With the attribute recompute_gates = True (it is False) a layer keeps only h and c for backward,
    2 numbers instead of 5 for each unit and step, and computes the gates again there.

    What torch.nn.LSTM has not, by keyword:
        lengths             integers [B] from 0 to T, in any order: the steps of each sequence of a
                            padded input. Behind them the output is zero, and h_n and c_n are the
                            states at each sequence's end.
        reset_mask          bool [T, B], or [B, T] with batch_first: where true, the state is zero
                            before that step, or h_0 and c_0 with reset_to_hx=True. A backward
                            direction's state is reset between the same two steps.
        return_cell_states  True: returns (output, (h_n, c_n), cells), cells being c of the last
                            layer at every step, [T, B, D * hidden_size] or as the input

    The kernels take floating-point numbers on the CPU and on CUDA devices, and torch's own
    implementation the rest: see fusedrnn.explain.
    Raises what torch.nn.LSTM raises: ValueError for an input that is neither 2-D nor 3-D or not of
    the weights' dtype, RuntimeError for a wrong size or dtype of hx; and ValueError for lengths or
    a reset_mask that do not fit. It is no torch.nn.LSTM for isinstance, but a torch.nn.RNNBase.
    """

    _torch_class = nn.LSTM
    _num_states = 2
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(self, input: Any, hx: Any = None, **keywords: Unpack[_LSTMKeywords]) -> Any:
        given = _given(keywords) if keywords else {}
        if is_compiling():
            return self._compiling(LSTM.forward, input, hx, given)
        plain = None if given else self._plain_layers(input, hx)
        if plain is not None:
            output, h_n, c_n = plain
            return output, (h_n, c_n)
        if hx is None or (isinstance(hx, (tuple, list)) and len(hx) == 2):
            result = self._computed(self._kernels, input, hx, given)
            if result is not None:
                output, h_n, c_n, *cells = result
                return output, (h_n, c_n), *cells
        if given:
            raise RuntimeError(f"hx must be (h_0, c_0), got {type(hx).__name__}")
        return self._torch_forward(input, hx)

    def _torch_forward(self, input: Any, hx: Any) -> Any:
        if isinstance(input, PackedSequence):
            # torch.nn.LSTM checks nothing here, and may compute something from wrong sizes.
            self.check_input(input.data, input.batch_sizes)
            if isinstance(hx, (tuple, list)) and len(hx) == 2:
                self.check_forward_args(input.data, hx, input.batch_sizes)  # type: ignore[arg-type, misc]
        return super()._torch_forward(input, hx)


class _OneStateLayers(_Layers):
    """GRU and RNN: one state, which is no tuple."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(*args, **kwargs)

    def forward(self, input: Any, hx: Any = None, **keywords: Unpack[_Keywords]) -> Any:
        given = _given(keywords) if keywords else {}
        if "return_cell_states" in given:
            raise TypeError(f"return_cell_states is an LSTM's, this is {self.mode}")
        if is_compiling():
            return self._compiling(_OneStateLayers.forward, input, hx, given)
        result = None if given else self._plain_layers(input, hx)
        if result is None and (hx is None or isinstance(hx, Tensor)):
            states = None if hx is None else (hx,)
            result = self._computed(self._kernels, input, states, given)
        if result is not None:
            output, h_n = result
            return output, h_n
        if given:
            raise RuntimeError(f"hx must be the tensor h_0, got {type(hx).__name__}")
        return self._torch_forward(input, hx)


class GRU(_OneStateLayers):
    """torch.nn.GRU: same constructor, parameters, initial weights, results and errors.

    GRU(input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
    bidirectional=False, device=None, dtype=None)

    forward(input, hx=None) -> (output, h_n): shapes, dtypes, errors, lengths and reset_mask as
    LSTM's, where hx is the tensor h_0. It is no torch.nn.GRU for isinstance, but a
    torch.nn.RNNBase.
    """

    _torch_class = nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(_OneStateLayers):
    """torch.nn.RNN: same constructor, parameters, initial weights, results and errors.

    RNN(input_size, hidden_size, num_layers=1, nonlinearity="tanh", bias=True, batch_first=False,
    dropout=0.0, bidirectional=False, device=None, dtype=None); nonlinearity is "tanh" or "relu",
    a ValueError otherwise.

    forward(input, hx=None) -> (output, h_n): shapes, dtypes, errors, lengths and reset_mask as
    LSTM's, where hx is the tensor h_0. It is no torch.nn.RNN for isinstance, but a
    torch.nn.RNNBase.
    """

    _torch_class = nn.RNN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)
        self.nonlinearity = nonlinearity


class _Cell(_Fused, nn.RNNCellBase):
    """What the cells share: one step of functional.py's layer."""

    def _kernel(self, cell: str, input: Any, states: States) -> Sequence[Tensor] | None:
        """The new states, or None where the call is torch's. No states: zeros."""
        parameters = self._parameters  # nn.Module.__getattr__ is slow
        try:
            weights = tuple([parameters[name] for name in _CELL_WEIGHTS])
        except KeyError:  # parametrized, pruned, ...
            weights = tuple([getattr(self, name) for name in _CELL_WEIGHTS])
        if not isinstance(input, Tensor) or input.dim() not in (1, 2):
            return None
        one_row = input.dim() == 1
        if one_row:
            input, states = input.unsqueeze(0), [s.unsqueeze(0) for s in states]
        panels = prepacking.panels(self, cell, 0, weights) if prepacking.active else None
        size = self.hidden_size
        new = _compute(self.input_size, size, cell, input, states, weights, None, panels)
        return [s.squeeze(0) for s in new] if one_row and new is not None else new


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell: same constructor, parameters, initial weights, results and errors.

    LSTMCell(input_size, hidden_size, bias=True, device=None, dtype=None)

    forward(input, hx=None) -> (h, c): input [B, input_size] or [input_size]; hx (h_0, c_0), each
    [B, hidden_size] or [hidden_size], zeros if None; h and c likewise. One dtype and device; the
    kernels take floating-point numbers on the CPU. Raises ValueError for an input or a state that
    is neither 1-D nor 2-D, RuntimeError for a wrong size or dtype.
    """

    _torch_class = nn.LSTMCell
    _num_states = 2

    def forward(self, input: Any, hx: Any = None) -> tuple[Tensor, Tensor]:
        if is_compiling():
            return nn.LSTMCell.forward(self, input, hx)
        new = self._plain("lstm", input, hx)
        if new is None and (hx is None or (isinstance(hx, (tuple, list)) and len(hx) == 2)):
            new = self._kernel("lstm", input, hx or ())
        if new is not None:
            h, c = new
            return h, c
        return self._torch_forward(input, hx)  # type: ignore[no-any-return]


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell: same constructor, parameters, initial weights, results and errors.

    GRUCell(input_size, hidden_size, bias=True, device=None, dtype=None)

    forward(input, hx=None) -> h: shapes, dtypes and errors as LSTMCell's, where hx is the tensor
    h_0.
    """

    _torch_class = nn.GRUCell

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        if is_compiling():
            return nn.GRUCell.forward(self, input, hx)
        new = self._plain("gru", input, hx)
        if new is None and (hx is None or isinstance(hx, Tensor)):
            new = self._kernel("gru", input, () if hx is None else (hx,))
        if new is not None:
            return new[0]
        return self._torch_forward(input, hx)  # type: ignore[no-any-return]


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell: same constructor, parameters, initial weights, results and errors.

    RNNCell(input_size, hidden_size, bias=True, nonlinearity="tanh", device=None, dtype=None)

    forward(input, hx=None) -> h: shapes, dtypes and errors as LSTMCell's, where hx is the tensor
    h_0. A nonlinearity other than "tanh" and "relu" is a RuntimeError there.
    """

    _torch_class = nn.RNNCell

    def forward(self, input: Any, hx: Any = None) -> Tensor:
        if is_compiling():
            return nn.RNNCell.forward(self, input, hx)
        cell = _RNN_CELLS.get(self.nonlinearity)
        if cell is None:
            return self._torch_forward(input, hx)  # type: ignore[no-any-return]
        new = self._plain(cell, input, hx)
        if new is None and (hx is None or isinstance(hx, Tensor)):
            new = self._kernel(cell, input, () if hx is None else (hx,))
        if new is not None:
            return new[0]
        return self._torch_forward(input, hx)  # type: ignore[no-any-return]
