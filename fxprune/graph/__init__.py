"""Graphs: how a model becomes one, what its nodes give and cost, and how it is edited.

`tracing` captures a model, with a `tracer` that keeps its `contexts`, and `modes`; `recording` does while it runs on
`examples`, with a `recorder`, as a `witness` of the trace, and for `replaying` at any batch size. `values` is what
nodes give, `costs` what layers cost, `convolutions` which kinds there are, `baking` makes computed weights plain.
`layers`, `norms`, `gathered` and `fused` are the modules that a result may contain and torch lacks. `editing` is what
every pass uses, `memory` tells which values share it; `copying` copies module trees, `containers` looks into any value.
"""
