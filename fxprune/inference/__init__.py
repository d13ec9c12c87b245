"""The fastest form of a network on one device: fused, packed, and every choice timed.

`acceleration` is `fxprune.accelerate`; `fused_graph` is what it makes, `forms` the ways to compute one layer of it,
`reporting` the account. `race` times things side by side, `stopwatch` remembers times. `engines` wrap `kernels`.
"""
