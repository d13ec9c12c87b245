"""Measurements of fxprune that this repository keeps records of, run from its root: `python -m benchmarks.accuracy`.

`latency`, `train` and `compare` are commands of the product (`fxprune bench`, `train`, `compare`) beside their records.
"""
