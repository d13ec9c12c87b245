"""Networks that no library of `requirements.txt` has, written by hand in their kind."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1


class HiFiGAN(nn.Module):
    """The generator of HiFi-GAN (Kong et al. 2020), form V2 without its weight norm: a mel spectrogram (N, 80, T) to a
    wave (N, 1, 256 T). Each transposed convolution is followed by the mean of three branches of dilated convolutions.
    """

    def __init__(self, width: int = 128, rates: tuple[int, ...] = (8, 8, 2, 2)) -> None:
        super().__init__()
        self.conv_pre = nn.Conv1d(80, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate in rates:
            self.ups.append(nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, padding=rate // 2))
            width //= 2
            self.resblocks.extend(ResBlock(width, kernel) for kernel in (3, 7, 11))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        branches = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            total = self.resblocks[i * branches](x)
            for j in range(1, branches):
                total = total + self.resblocks[i * branches + j](x)
            x = total / branches
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


class ResBlock(nn.Module):
    """The first kind of residual block of HiFi-GAN."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...] = (1, 3, 5)) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class PeriodDiscriminator(nn.Module):
    """One discriminator of HiFi-GAN: folds a wave (N, 1, T) into rows of one period and looks at them in 2-D. Gives the
    score and what every layer found, as its feature loss wants.
    """

    def __init__(self, period: int = 5, widths: tuple[int, ...] = (1, 32, 64, 128, 128)) -> None:
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(nn.Conv2d(i, o, (5, 1), (3, 1), padding=(2, 0)) for i, o in pairwise(widths))
        self.conv_post = nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        batch, channels, length = x.shape
        if length % self.period:
            x = F.pad(x, (0, self.period - length % self.period), "reflect")
            length = x.shape[-1]
        x = x.view(batch, channels, length // self.period, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        x = self.conv_post(x)
        features.append(x)
        return torch.flatten(x, 1, -1), features


class Wav2Letter(nn.Module):
    """Wav2Letter on 80 features (Collobert et al. 2016): (N, 80, T) to the log-probabilities of 40 letters; its twelve
    convolutions in their sizes, the widths a quarter.
    """

    def __init__(self, letters: int = 40) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(80, 64, 48, 2, 23), nn.ReLU(inplace=True)]
        for _ in range(7):
            layers += [nn.Conv1d(64, 64, 7, 1, 3), nn.ReLU(inplace=True)]
        layers += [nn.Conv1d(64, 512, 32, 1, 16), nn.ReLU(inplace=True)]
        layers += [nn.Conv1d(512, 512, 1), nn.ReLU(inplace=True)]
        layers += [nn.Conv1d(512, letters, 1), nn.ReLU(inplace=True)]
        self.acoustic_model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.acoustic_model(x), dim=1)
