"""Class activation maps (Zhou et al., CVPR 2016), and the box around what they show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from semi_fast.parts.forward import full_precision

LEAST = 1e-12  # range of a map, so that a constant one is 0 everywhere


def require_maps(net: nn.Module) -> None:
    """Raises: UserError where a network has no features by place."""
    if not hasattr(net, "maps"):
        raise UserError(
            "The method needs features by place (n, d, h, w), and this net averages over something else (tokens, say). "
            "Use a convolutional net."
        )


@torch.no_grad()
def activation_maps(net: nn.Module, weight: Tensor, images: Tensor, classes: Tensor) -> Tensor:
    """sum_d W_kd F_d of the class k given for each image, brought to the images' size and to 0..1.

    Args:
        net: with a method `maps`: images -> features by place (n, d, h, w). weight: (K, d), of a linear classifier.
        images: (n, 3, H, W). classes: (n,) int64.

    Returns: (n, H, W) float32 in [0, 1]; 0 throughout where a map is constant.

    Raises: UserError for a network without `maps`.
    """
    require_maps(net)
    features: Tensor = net.maps(images)  # type: ignore[operator]
    with full_precision(images):
        weighted = (features.float() * weight[classes].float()[:, :, None, None]).sum(1, keepdim=True)
        grown = F.interpolate(weighted, size=images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
        low, high = grown.amin((1, 2), keepdim=True), grown.amax((1, 2), keepdim=True)
        return (grown - low) / (high - low).clamp_min(LEAST)


@torch.no_grad()
def box_mask(shown: Tensor) -> Tensor:
    """The smallest box that holds every place shown. (n, H, W) bool -> (n, H, W) bool; empty where none is shown."""
    height, width = shown.shape[1:]
    rows, columns = torch.arange(height, device=shown.device), torch.arange(width, device=shown.device)
    return _span(shown.any(2), rows).unsqueeze(2) & _span(shown.any(1), columns).unsqueeze(1)


def _span(shown: Tensor, index: Tensor) -> Tensor:
    """From the first to the last place shown, (n, m) bool, of (n, m) bool and the places 0, ..., m - 1."""
    first = torch.where(shown, index, len(index)).amin(1, keepdim=True)
    last = torch.where(shown, index, -1).amax(1, keepdim=True)
    return (index >= first) & (index <= last)
