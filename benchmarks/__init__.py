"""fusedrnn against torch.nn: pytest-benchmark files (bench_*.py), the table of the README
(`python -m benchmarks.table`) and real models (workloads/). Not a part of the installed package.
"""
