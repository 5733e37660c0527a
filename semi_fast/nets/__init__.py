"""Networks: images (n, 3, H, W) -> features (n, d). Heads belong to the methods.

A network has one attribute more than a module: `num_features`, the size d of its features. Those here also have
`depths`, the names of their modules or parameters from the images to the features, by which groups of them are frozen
or trained more slowly; and, where there are any, `maps`, the features before they are averaged over places. Names on
the command line: `wrn<depth>_<width>` (the paper's is `wrn28_2`), `resnet50`, and `timm/<name>` for any of timm's.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from data_prep.errors import UserError, unknown
from pipelines.batch import Info
from semi_fast.nets.backbone import PREFIX, Backbone, build_backbone
from semi_fast.nets.residual import ResNet50, WideResNet
from semi_fast.parts.groups import ParamGroup

NAMES = ("wrn28_2", "resnet50", "wrn<depth>_<width>", f"{PREFIX}<name>")
Net = WideResNet | ResNet50 | Backbone


def build_net(
    name: str,
    *,
    bn_momentum: float,
    raw_transitions: bool = False,
    stem: str = "native",
    normalize: str = "data",
    checkpointing: bool = False,
    info: Info | None = None,
) -> Net:
    """The network of that name, in channels_last memory format, as initialized.

    Args:
        name: `resnet50`, `wrn<depth>_<width>` with a depth of 6n + 4, or `timm/<name>`.
        bn_momentum: share of the newest batch in BatchNorm's running statistics, in PyTorch's sense, in (0, 1].

        raw_transitions: whether groups 2 and 3 of a wide residual network start from features that are neither
            normalized nor activated, as in the code of SeMi, ACR and USB.
        stem: "small" for a first convolution of 3x3 and stride 1 without max-pool, of timm's networks.
        normalize: by whose mean and standard deviation images of timm's networks are normalized: the "data"'s, or those
            that its "weights" were trained with.
        checkpointing: whether activations are computed again in the backward pass, of timm's networks.
        info: the data set, which timm's networks need: how large its images are, and how they are normalized.

    Raises: UserError for a name or a depth that does not exist, for an option that the network does not have, and where
        timm cannot be imported.
    """
    wide = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    on_timm = name.startswith(PREFIX)
    for option, given, kind, has in (
        ("raw_transitions", raw_transitions, "wrn<depth>_<width>", wide),
        ("stem=small", stem == "small", f"{PREFIX}<name>; ours have such a stem", on_timm),
        ("normalize=weights", normalize == "weights", f"{PREFIX}<name>, which says how it was trained", on_timm),
        ("checkpointing", checkpointing, f"{PREFIX}<name>", on_timm),
    ):
        if given and not has and (wide or on_timm or name in NAMES):
            raise UserError(f"net.{option} is for {kind}, got net={name}. Leave it out.")
    net: Net
    if wide:
        net = WideResNet(int(wide[1]), int(wide[2]), bn_momentum, raw_transitions=raw_transitions)
    elif name == "resnet50":
        net = ResNet50(bn_momentum)
    elif on_timm:
        if info is None:
            raise TypeError(f"net={name} needs the data set's Info: its resolution, mean and std.")
        net = build_backbone(name.removeprefix(PREFIX), info, bn_momentum, stem, normalize, checkpointing)
    else:
        raise unknown("net", name, NAMES)
    to: Any = net.to  # some versions of torch leave memory_format out of its signature
    made: Net = to(memory_format=torch.channels_last)
    return made


def depth_groups(net: Net, freeze: int, decay: float) -> tuple[ParamGroup, ...]:
    """The groups of a method's network `net` by their depth: the first `freeze` of them frozen, early ones slower.

    The learning rate of group i of n has the factor decay^(n - i), i from 0 at the images: a head, which comes behind
    them, has the factor 1 (Clark et al., ICLR 2020; Bao et al., "BEiT", ICLR 2022, Appendix). Groups are blocks; the
    stem is the first, and a last normalization belongs to the last block, except where timm has a group of its own.

    Args:
        freeze: 0 or more. decay: in (0, 1].

    Raises: UserError for more groups than there are.
    """
    if not freeze and decay == 1:
        return ()
    depths = net.depths()
    if freeze > len(depths):
        raise UserError(f"net.freeze={freeze} is more than the {len(depths)} groups of the network. Set it lower.")
    return tuple(
        ParamGroup(f"net.{prefix}", decay ** (len(depths) - i), frozen=i < freeze)
        for i, prefixes in enumerate(depths)
        for prefix in prefixes
    )
