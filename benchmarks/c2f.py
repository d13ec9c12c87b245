"""A detector of the size of YOLOv8n, written by hand: C2f blocks, pyramid pooling, a path up and down, a head for boxes
and one for classes at each of three scales.

The vendor's class decodes boxes in ways that no graph holds, and can be pruned, but not accelerated as a whole; its
layers are these. Widths and depths are those of its `yolov8.yaml` at scale `n`. Written with torch alone.
"""

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 256)
CLASSES, BINS = 80, 16
"""Of COCO; and of the distribution of each side of a box."""


class ConvNormAct(nn.Sequential):
    """A convolution that keeps the size at stride 1, BatchNorm, SiLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs, eps=1e-3), nn.SiLU())


class Bottleneck(nn.Module):
    """Two 3x3 convolutions, with the input added where asked."""

    def __init__(self, width: int, adds: bool) -> None:
        super().__init__()
        self.inner, self.outer = ConvNormAct(width, width, 3), ConvNormAct(width, width, 3)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        y: Tensor = self.outer(self.inner(x))
        return x + y if self.adds else y


class C2f(nn.Module):
    """Half of the channels through a chain of bottlenecks; both halves and all that the chain gives, concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int, adds: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.entry = ConvNormAct(inputs, outputs)
        self.chain = nn.ModuleList(Bottleneck(half, adds) for _ in range(depth))
        self.exit = ConvNormAct((2 + depth) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, D, H, W)`."""
        first, second = self.entry(x).chunk(2, 1)
        parts = [first, second]
        for block in self.chain:
            parts.append(block(parts[-1]))
        y: Tensor = self.exit(torch.cat(parts, 1))
        return y


class PyramidPooling(nn.Module):
    """Three max poolings, one after the other, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry, self.exit = ConvNormAct(width, width // 2), ConvNormAct(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        parts = [self.entry(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        y: Tensor = self.exit(torch.cat(parts, 1))
        return y


class Detector(nn.Module):
    """Backbone, neck and heads."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        self.stem = nn.Sequential(ConvNormAct(3, a, 3, 2), ConvNormAct(a, b, 3, 2), C2f(b, b, 1, adds=True))
        self.fine = nn.Sequential(ConvNormAct(b, c, 3, 2), C2f(c, c, 2, adds=True))
        self.middle = nn.Sequential(ConvNormAct(c, d, 3, 2), C2f(d, d, 2, adds=True))
        self.coarse = nn.Sequential(ConvNormAct(d, e, 3, 2), C2f(e, e, 1, adds=True), PyramidPooling(e))
        self.upsample = nn.Upsample(scale_factor=2)
        self.up_middle, self.up_fine = C2f(e + d, d, 1), C2f(d + c, c, 1)
        self.to_middle, self.down_middle = ConvNormAct(c, c, 3, 2), C2f(c + d, d, 1)
        self.to_coarse, self.down_coarse = ConvNormAct(d, d, 3, 2), C2f(d + e, e, 1)
        self.boxes = nn.ModuleList(_head(width, max(16, c // 4, 4 * BINS), 4 * BINS) for width in (c, d, e))
        self.classes = nn.ModuleList(_head(width, max(c, CLASSES), CLASSES) for width in (c, d, e))

    def forward(self, x: Tensor) -> Tensor:
        """Images `(N, 3, H, W)` to the bins of boxes and the scores of classes at all places, `(N, 144, places)`."""
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.up_middle(torch.cat((self.upsample(coarse), middle), 1))
        fine = self.up_fine(torch.cat((self.upsample(middle), fine), 1))
        middle = self.down_middle(torch.cat((self.to_middle(fine), middle), 1))
        coarse = self.down_coarse(torch.cat((self.to_coarse(middle), coarse), 1))
        maps = [
            torch.cat((boxes(scale), classes(scale)), 1).flatten(2)
            for boxes, classes, scale in zip(self.boxes, self.classes, (fine, middle, coarse), strict=True)
        ]
        return torch.cat(maps, 2)


def _head(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(inputs, width, 3), ConvNormAct(width, width, 3), nn.Conv2d(width, outputs, 1))
