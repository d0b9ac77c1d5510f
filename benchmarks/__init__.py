"""fusedrnn against torch.nn and others. The suite, `python -m benchmarks run`: suite.py, with
peers.py, limits.py, memory.py, report.py and plots.py; real models: workloads/; regressions, under
pytest-benchmark: bench_sequence.py and bench_cell.py; single questions: bench_lengths.py,
bench_samples.py and bench_cuda.py. Not a part of the installed package.
"""
