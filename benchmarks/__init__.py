"""fusedrnn against torch.nn: pytest-benchmark files (bench_sequence.py, bench_cell.py), the table
of the README (`python -m benchmarks.bench_grid`), the same on a GPU (`python -m
benchmarks.bench_cuda`) and real models (workloads/). Not a part of the installed package.
"""
