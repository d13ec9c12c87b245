"""The dependency analyzer: labels on every channel axis, and which channels may change places.

`atoms` holds the identities and solves for blocks; `interpreter` the state that rules work on; `rules` say how
channels pass through a family of operators, `operators` which operator belongs to which; `analysis` walks the graph.
`capture` decides whether that is a trace or a recording.
"""

from fxprune.channels.analysis import ChannelAnalysis, ChannelSpace, analyze_channels
from fxprune.channels.atoms import Blocks, Reordering
from fxprune.channels.interpreter import Port, Scale

__all__ = ["Blocks", "ChannelAnalysis", "ChannelSpace", "Port", "Reordering", "Scale", "analyze_channels"]
