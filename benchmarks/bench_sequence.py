"""LSTM, GRU and RNN over 100 steps, fusedrnn against torch.nn, one group a shape:
`python -m pytest benchmarks/bench_sequence.py`. Each pair runs one after the other; for figures to
quote, benchmarks/table.py times them in turns.
"""

import pytest

from .common import IMPLEMENTATIONS, MODES, SHAPES, check, cores, grad_mode, make_cases, threads


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2], ids="threads{}".format)
@pytest.mark.parametrize(("batch", "size"), SHAPES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_sequence(benchmark, cell, batch, size, count, mode, implementation):
    if count > cores():
        pytest.skip(f"{count} threads need {count} cores, this process has {cores()}")
    benchmark.group = f"{cell} B={batch} H={size}, {mode}, threads: {count}"
    cases = make_cases(cell, batch, size)
    with threads(count):
        check(cases, mode)
        with grad_mode(mode):
            benchmark(cases[implementation].call(mode))
