"""What torch.mm and reading memory reach, measured in the run that is compared with them."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

GEMM_SIZE = 1024
MEMORY_BYTES = 1 << 28  # far beyond any L3
REPEATS = 10


@dataclass(frozen=True)
class Limits:
    """Of one number of threads."""

    gemm: dict[str, float]  # GFLOP/s of torch.mm, by dtype: the best of two sizes and layouts
    l2: float  # GB/s read
    memory: float  # GB/s read
    l2_bytes: int  # the L2 of all threads


def l2_bytes() -> int:
    """The L2 cache of a core; 1 MiB if the system does not tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


def best_seconds(call: Callable[[], Any], times: int) -> float:
    return min(timeit.repeat(call, number=times, repeat=REPEATS)) / times


def measure(threads: int, dtypes: Sequence[str]) -> Limits:
    """To be called while torch uses `threads` threads."""
    gemm = {}
    for name in dtypes:
        gemm[name] = max(
            2 * size**3 / best_seconds(partial(torch.mm, a, b), 1) / 1e9
            for size in (GEMM_SIZE, 2 * GEMM_SIZE)
            for a in [torch.randn(size, size).to(getattr(torch, name))]
            for b in (a, a.t())
        )
    l2 = threads * l2_bytes()
    half, quarter = torch.randn(l2 // 8), torch.randn(l2 // 16)  # of 4 bytes each
    # The difference, so that the price of a call drops out.
    seconds = best_seconds(half.sum, 100) - best_seconds(quarter.sum, 100)
    large = torch.ones(MEMORY_BYTES // 4)
    memory = MEMORY_BYTES / best_seconds(large.sum, 1) / 1e9
    return Limits(gemm, l2 / 4 / seconds / 1e9, memory, l2)
