"""Measurements of fxprune, run from the root of the repository: `python -m benchmarks.accuracy`, `.compile_time`."""
