"""CUDA graphs: a call recorded once and replayed without Python, so that only the device's own time is left."""

from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3  # calls before a capture, in which libraries make their choices (torch.cuda.graphs asks for it)


def captured(call: Callable[[], Any], times: int = 1) -> Callable[[], Any]:
    """Record `times` calls in a row as one CUDA graph; what is returned replays them.

    The result of a replay is that of the last call, in the same memory each time. The captured tensors are used where
    they are: write new inputs into them. A graph holds addresses and owns none of them, so that what is returned keeps
    the call, and with it weights and inputs, alive.

    Raises:
        RuntimeError: the call does what no graph can hold, such as reading a value back from the device.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            output = call()

    def replay(_alive: Callable[[], Any] = call) -> Any:
        graph.replay()
        return output

    return replay
