"""Small trained-like networks of every kind that recovery meets, and images for them."""
# nn.Module.__call__ is typed to return Any; each net would need a cast.
# mypy: disable-error-code="no-any-return"

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from equality import randomize
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem and two residual blocks, with a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.first = nn.Sequential(*_unit(16, 16), nn.ReLU(), *_unit(16, 16))
        self.second = nn.Sequential(*_unit(16, 16), nn.ReLU(), *_unit(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.first(x) + x)
        x = F.relu(self.second(x) + x)
        return self.head(x.mean((2, 3)))


def _unit(inputs: int, outputs: int, groups: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs)


def plain() -> nn.Module:
    """Convolutions with biases between poolings, and no BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


class Depthwise(nn.Module):
    """An inverted residual block, as MobileNetV2 has it, behind one without a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_unit(3, 16), nn.ReLU6())
        self.project = nn.Sequential(*_unit(16, 16, 16), nn.ReLU6(), nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16))
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU6(), *_unit(32, 32, 32), nn.ReLU6(),
            nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.stem(x))
        return self.head((x + self.block(x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "plain": plain, "depthwise": Depthwise}
PLANS: dict[str, dict[str, Any]] = {
    "kernels": {"ratio": 0.75, "groups": 4, "form": "overlap"},
    # Filters go by their norm: for the error, so little is lost of nets so small that nothing is left to recover.
    "filters": {"ratio": 0.25, "granularity": "filter", "criterion": "l2"},
    "both": {"granularity": {"filter": 0.25, "kernel": 0.5}, "groups": 2, "form": "overlap", "criterion": "l2"},
}


def net_of(name: str) -> nn.Module:
    """One of `NETS` with random statistics, in evaluation mode and float32."""
    return randomize(NETS[name]()).float().eval()


def images(count: int = 100, size: int = 8, seed: int = 1) -> Tensor:
    """Noise, which a refit of small networks cannot reproduce to the end."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The tensors that are not bit for bit what they were."""
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
