"""How much memory a call takes: what forward keeps for backward, and the peak of both."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedrnn import ops

from . import common

CALLS = 5  # of which the least counts: malloc wastes more in some than in others


def saved_bytes(case: common.Case) -> int:
    """Of the storages that a forward pass keeps for the backward, each counted once.

    Not counted are the parameters, the input and the initial states, which are there anyway.
    """
    there = {t.untyped_storage().data_ptr() for t in (case.input, *case.states, *case.leaves)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = case.forward()  # held, so that no address is used twice
    del results
    return sum(found.values())


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int | None:
    """By how much `call` raises the memory in use at most.

    On the CPU that is the process's resident memory, as Linux tells it: scratch memory of oneDNN
    and of fusedrnn's kernels counts, which torch's profiler does not see, and so does what malloc
    wastes. Small calls are told to some tens of KiB. None where the system does not tell. On CUDA
    devices it is what torch's allocator has given out.
    """
    call()  # what is made once is not the call's
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        return min(_peak(call) for _ in range(CALLS))
    except (OSError, AttributeError, KeyError):  # not Linux, not glibc, or not allowed
        return None


def _peak(call: Callable[[], Any]) -> int:
    # Else memory that was kept or freed before would be taken unseen.
    ops._C.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the highest so far, starts anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) * 1024


def of(cases: dict[str, common.Case], device: str = "cpu") -> dict[str, dict[str, int | None]]:
    """Of a forward and backward pass of every case, whose gradients are there before already."""
    return {
        name: {
            "saved_bytes": saved_bytes(case),
            "peak_bytes": peak_bytes(case.forward_backward, device),
        }
        for name, case in cases.items()
    }
