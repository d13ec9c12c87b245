"""Ways to compute a `FusedConv2d` fast on one device. All give the same result up to rounding."""

from fxprune.inference.engines.cudnn import CudnnConv2d
from fxprune.inference.engines.depthwise import NativeDepthwiseConv2d
from fxprune.inference.engines.engine import Engine
from fxprune.inference.engines.library import LibraryConv2d
from fxprune.inference.engines.native import NativeConv2d
from fxprune.inference.engines.onednn import OneDnnConv2d
from fxprune.inference.engines.triton import TritonConv2d

__all__ = [
    "ENGINES",
    "CudnnConv2d",
    "Engine",
    "LibraryConv2d",
    "NativeConv2d",
    "NativeDepthwiseConv2d",
    "OneDnnConv2d",
    "TritonConv2d",
]

ENGINES: tuple[type[Engine], ...] = (
    LibraryConv2d,
    OneDnnConv2d,
    NativeConv2d,
    NativeDepthwiseConv2d,
    CudnnConv2d,
    TritonConv2d,
)
