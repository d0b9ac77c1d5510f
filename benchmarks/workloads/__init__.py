"""Whole models, trained with torch.nn and with fusedrnn: `python -m benchmarks.workloads.NAME`."""
