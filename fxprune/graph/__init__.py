"""Graphs: how a model becomes one, what its nodes give and cost, and how it is edited.

`tracing` captures a model, with a `tracer` that keeps its `contexts`, and `modes`; `values` is what nodes give, `costs`
what layers cost; `layers` and `fused` are the modules that a graph may contain and torch lacks; `editing` is what every
pass uses, `memory` tells which values share it; `copying` copies module trees, `containers` looks into any value.
"""
