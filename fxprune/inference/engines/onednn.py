"""oneDNN with weights in its own blocked order, packed once, and with add and activation in the same call.

`torch.ops.mkldnn` are the operators that TorchInductor emits for frozen models (torch/_inductor/mkldnn_ir.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.jit import is_scripting  # type: ignore[attr-defined]  # public, but not in its __all__

from fxprune.graph.fused import FusedConv2d, finish, gather_channels
from fxprune.inference.engines.engine import Engine


class OneDnnConv2d(Engine):
    """`mkldnn::_convolution_pointwise` on a packed weight, which is no ordinary tensor: the model can be copied,
    pickled and scripted, but a scripted one cannot be saved. Its activations make
    finite numbers of NaN and infinity.
    """

    name = "onednn"

    bias: Tensor | None
    index: Tensor | None
    order: Tensor | None

    def __init__(self, conv: FusedConv2d, memory_format: torch.memory_format) -> None:
        super().__init__(conv, memory_format)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.minimum, self.maximum = conv.minimum, conv.maximum
        self.is_relu = conv.minimum == 0 and conv.maximum is None
        # A grouped convolution adds and rectifies in a second sweep, which knows no bfloat16 (torch 2.15).
        self.adds_and_rectifies = self.is_relu and (conv.groups == 1 or conv.weight.dtype == torch.float32)
        self.is_bounded = conv.minimum is not None and conv.maximum is not None
        self.register_buffer("bias", conv.bias)
        self.register_buffer("index", conv.index)
        self.register_buffer("order", conv.order)
        self.packed = self._pack(conv.weight.contiguous(memory_format=memory_format))

    @classmethod
    def obstacle(cls, conv: FusedConv2d, memory_format: torch.memory_format) -> str:
        if conv.weight.device.type != "cpu":
            return f"oneDNN runs on the CPU, not on {conv.weight.device.type}"
        has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if not has_onednn or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
            return "this build of torch has no oneDNN"
        if conv.weight.dtype not in (torch.float32, torch.bfloat16):
            return f"no packed form for {conv.weight.dtype}"
        if conv.weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this processor has no bfloat16 instructions"
        return ""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        index, order = self.index, self.order  # TorchScript refines locals, not attributes
        if index is not None:
            x = gather_channels(x, index)
        if residual is not None and order is None:
            y = torch.ops.mkldnn._convolution_pointwise(
                x, residual, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups,
                "add", None, "relu" if self.adds_and_rectifies else None, [], None,
            )  # fmt: skip
            return y if self.adds_and_rectifies else finish(y, None, None, self.minimum, self.maximum)
        if residual is None and order is None and (self.is_relu or self.is_bounded):
            return self._activated(x)
        y = torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )
        return finish(y, order, residual, self.minimum, self.maximum)

    def _activated(self, x: Tensor) -> Tensor:
        if self.is_relu or is_scripting():  # TorchScript has no way to write a list of scalars
            y: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups,
                "relu" if self.is_relu else "none", [], "",
            )  # fmt: skip
            return y if self.is_relu else finish(y, None, None, self.minimum, self.maximum)
        bounded: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups,
            "hardtanh", [self.minimum, self.maximum], "",
        )  # fmt: skip
        return bounded

    @torch.jit.unused
    def _pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, None
        )
        return packed

    @torch.jit.unused
    def __getstate__(self) -> dict[str, Any]:
        """Deepcopy and pickle cannot take a packed tensor: unpack it."""
        return {**self.__dict__, "packed": self.packed.to_dense()}

    @torch.jit.unused
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.packed = self._pack(self.packed)
