"""Pruners against each other, in time and in accuracy: `fxprune bench` and `fxprune compare`.

Time: `latency` races `rivals` in all `runtimes` and checks their outputs against `limits`; `layers` looks at single
convolutions. Accuracy: `accuracy` prunes by each of `methods`, fine-tunes all alike, and `points` are what it found.
`plots` draws both. `torch_pruning` is another library's pruner; it and matplotlib are `extras`.
"""
