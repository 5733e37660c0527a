"""The one forward over all rows of a step, and its parts: features and every head's logits of the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.batch import Batch


class Rows(NamedTuple):
    """Some rows of the joint forward: features and logits of the same images, in the same order."""

    features: Tensor  # (n, d) float32
    logits: dict[str, Tensor]  # head -> (n, K) float32


# Stream -> view -> its rows, view-major: row v * B + u is the v-th view of that name of image u.
Joint = dict[str, dict[str, Rows]]


def num_features(net: nn.Module) -> int:
    """Size d of the features a network returns, which it must have as its attribute ``num_features``."""
    size = getattr(net, "num_features", None)
    if not isinstance(size, int):
        raise TypeError(f"A network needs an integer attribute num_features, got {size!r} from {type(net).__name__}.")
    return size


def linear_head(net: nn.Module, classes: int) -> nn.Linear:
    """A linear classifier on a network's features, (n, d) -> (n, classes): Xavier-normal weight, zero bias."""
    head = nn.Linear(num_features(net), classes)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def forward_rows(net: nn.Module, heads: nn.ModuleDict, images: Tensor) -> Rows:
    """Features and every head's logits of images (n, 3, H, W), in float32: autocast is for the network alone.

    Choice: heads multiply in float32. In bf16 a logit has 8 bits, and two classes that are close become equal; a head
    costs next to nothing beside the network.
    """
    features = net(images).float()
    with full_precision(images):
        return Rows(features, {name: head(features) for name, head in heads.items()})


def forward_jointly(net: nn.Module, heads: nn.ModuleDict, batch: Batch) -> Joint:
    """One forward over all rows of a batch, taken apart into features *and* logits at once.

    BatchNorm sees one joint batch. *released*: the code of SeMi's authors slices the features from an interleaved batch
    and the logits from the de-interleaved one, so that bank, prototypes and L_EA see other images' labels; taking both
    apart in this one function rules that out.
    """
    rows = forward_rows(net, heads, batch.images)
    sizes = [group.rows for group in batch.groups]
    features = rows.features.split(sizes)
    logits = {name: values.split(sizes) for name, values in rows.logits.items()}
    joint: Joint = {}
    for i, group in enumerate(batch.groups):
        part = Rows(features[i], {name: values[i] for name, values in logits.items()})
        joint.setdefault(group.stream, {})[group.view] = part
    return joint


def full_precision(x: Tensor) -> torch.autocast:
    """A context for losses and statistics on x's device: autocast off, so that float32 stays float32."""
    return torch.autocast(x.device.type, enabled=False)
