"""LSTM, GRU and RNN over 100 steps, fusedrnn against torch.nn, one group a shape:
`python -m pytest benchmarks/bench_sequence.py`. Each pair runs one after the other; for figures to
quote, `python -m benchmarks run` times them in turns.
"""

import pytest

from .common import IMPLEMENTATIONS, MODES, SHAPES, run_benchmark


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize(("batch", "size"), SHAPES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_sequence(benchmark, cell, batch, size, count, mode, implementation):
    run_benchmark(benchmark, cell, batch, size, count, mode, implementation)
