"""Whole models, trained with torch.nn and with fusedrnn: `python -m benchmarks.workloads.NAME`.

A workload is one file: data, a model of torch.nn's modules, train(), a measure of what it learned,
and main(). What they share is in common.py, and in scenes.py for those that look at pictures.
"""
