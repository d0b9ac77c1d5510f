"""LSTMCell, GRUCell and RNNCell, one step, fusedrnn against torch.nn, one group a shape:
`python -m pytest benchmarks/bench_cell.py`. Mostly the price of a call, not of the arithmetic.
"""

import pytest

from .common import CELL_SHAPES, IMPLEMENTATIONS, MODES, run_benchmark


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize(("batch", "size"), CELL_SHAPES)
@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cell(benchmark, cell, batch, size, count, mode, implementation):
    run_benchmark(benchmark, cell, batch, size, count, mode, implementation)
