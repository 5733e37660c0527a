"""The networks of the published figures, for small images: wide residual ones, and a ResNet-50 with a small stem."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError

LEAK = 0.1  # negative slope of LeakyReLU in the wide residual network


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded to keep the side (at stride 1)."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


def init_convolutions(net: nn.Module, leak: float) -> None:
    """He-normal (fan-out) weights for the rectifier in use; BatchNorm keeps PyTorch's ones and zeros."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=leak, mode="fan_out", nonlinearity="leaky_relu")


class BatchNorm(nn.BatchNorm2d):
    """PyTorch's, but for the count of batches, a launch each: nothing reads it where the momentum is a number."""

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        momentum: Any = self.momentum
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, momentum, self.eps)


class WideBlock(nn.Module):
    """Pre-activation residual block: (n, inputs, h, w) -> (n, outputs, h / stride, w / stride).

    A `raw` one has no normalization and no activation before its first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bn_momentum: float, *, first: bool, raw: bool) -> None:
        super().__init__()
        self.bn1 = None if raw else BatchNorm(inputs, momentum=bn_momentum)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.bn2 = BatchNorm(outputs, momentum=bn_momentum)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride)
        # The network's first block activates before the residual is taken, too: its input is a bare convolution.
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.bn1 is None else F.leaky_relu(self.bn1(x), LEAK)
        residual = h if self.first else x
        if self.shortcut is not None:
            residual = self.shortcut(residual)
        return self.conv2(F.leaky_relu(self.bn2(self.conv1(h)), LEAK)) + residual


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko & Komodakis, 2016) as used for CIFAR and STL: wrn28_2 has d = 128.

    LeakyReLU of slope 0.1, no dropout, global average pooling: (n, 3, H, W) -> (n, 64 * width) for H = W >= 8.

    Choice: its transitions are pre-activated, as in Google's FixMatch and DASO. With `raw_transitions` it is the
    network of the published figures of SeMi, ACR and USB. They have a BatchNorm there whose output nothing reads; it is
    left out.
    """

    def __init__(self, depth: int, width: int, bn_momentum: float, *, raw_transitions: bool = False) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UserError(
                f"wrn<depth>_<width> needs a depth of 10, 16, 22, 28, ... and a width >= 1, got wrn{depth}_{width}."
            )
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.num_features = widths[-1]
        self.stem = conv(3, widths[0], 3)
        blocks = []
        for group in range(3):
            for place in range((depth - 4) // 6):
                inputs = widths[group] if place == 0 else widths[group + 1]
                stride = 2 if group > 0 and place == 0 else 1
                first, raw = group == 0 and place == 0, raw_transitions and stride == 2
                blocks.append(WideBlock(inputs, widths[group + 1], stride, bn_momentum, first=first, raw=raw))
        self.blocks = nn.Sequential(*blocks)
        self.bn = BatchNorm(widths[-1], momentum=bn_momentum)
        init_convolutions(self, LEAK)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3))

    def depths(self) -> list[list[str]]:
        """Names of its modules from the images to the features: the stem, then block by block."""
        *blocks, last = ([f"blocks.{i}"] for i in range(len(self.blocks)))
        return [["stem"], *blocks, [*last, "bn"]]

    def maps(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, d, H / 4, W / 4), whose mean over the places are the features."""
        return F.leaky_relu(self.bn(self.blocks(self.stem(x))), LEAK)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block with the stride in its 3x3: (n, inputs, h, w) -> (n, 4 * inner, h / stride, ...)."""

    def __init__(self, inputs: int, inner: int, stride: int, bn_momentum: float) -> None:
        super().__init__()
        outputs = 4 * inner
        self.conv1, self.bn1 = conv(inputs, inner, 1), BatchNorm(inner, momentum=bn_momentum)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride), BatchNorm(inner, momentum=bn_momentum)
        self.conv3, self.bn3 = conv(inner, outputs, 1), BatchNorm(outputs, momentum=bn_momentum)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), BatchNorm(outputs, momentum=bn_momentum))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + (x if self.shortcut is None else self.shortcut(x)))


class ResNet50(nn.Module):
    """ResNet-50 for small images (ImageNet-127): a 3x3 stem of stride 1 and no max-pool; d = 2048."""

    num_features = 2048

    def __init__(self, bn_momentum: float) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 64, 3), BatchNorm(64, momentum=bn_momentum)
        blocks = []
        inputs = 64
        for inner, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for place in range(count):
                blocks.append(Bottleneck(inputs, inner, stride if place == 0 else 1, bn_momentum))
                inputs = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        init_convolutions(self, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3))

    def depths(self) -> list[list[str]]:
        """Names of its modules from the images to the features: the stem, then block by block."""
        return [["stem", "bn"], *([f"blocks.{i}"] for i in range(len(self.blocks)))]

    def maps(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, d, H / 8, W / 8), whose mean over the places are the features."""
        return self.blocks(F.relu(self.bn(self.stem(x))))
