"""Whole filters: what may go, what must go with it, which go, and what the graph looks like without them.

`units` is the data; `removability` asks where zero stays zero; `compaction` tells operators that move data of the new
sizes; `removal` finds the units of a network; `selection` scores and chooses them; `planning` makes a plan of it. The
pass is `fxprune.passes.RemoveChannels`.
"""
