"""Networks of timm (github.com/huggingface/pytorch-image-models), an optional dependency: the extra [timm]."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_prep.errors import UserError
from pipelines.batch import Info

PREFIX = "timm/"  # of their names on the command line
NEAR = 3  # names that an error suggests


def import_timm() -> Any:
    """The package timm. Raises: UserError where it is not installed, or cannot be imported."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise _broken(error) from None
        raise UserError(f"net={PREFIX}<name> needs timm. Install it: pip install -e '.[timm]'.") from None
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: operators that torch has and torchvision not
        raise _broken(error) from None
    return timm


def _broken(error: Exception) -> UserError:
    reason = " ".join(str(error).split()).rstrip(".")
    return UserError(
        f"timm can't be imported: {reason}. Its torchvision must fit torch {torch.__version__}: install the two from "
        "the same index, or leave timm out with another net."
    )


class Backbone(nn.Module):
    """A network of timm without its head: (n, 3, H, W), normalized as the data set is, -> (n, d) pooled features.

    Images are normalized anew, to the mean and standard deviation that the network's weights know. Both are part of its
    weights: checkpoints hold them, and whatever starts from one goes on with them.

    Args:
        model: timm's, made with num_classes=0. num_features: d.
        info: the data set; its images are `resolution` px large and come with its `mean` and `std`.
        mean, std: of pixels / 255, three numbers each, by which the model sees them.
    """

    mean: Tensor  # (1, 3, 1, 1) float32
    std: Tensor
    data_mean: Tensor
    data_std: Tensor

    def __init__(self, model: nn.Module, num_features: int, info: Info, mean: Any, std: Any) -> None:
        super().__init__()
        self.model, self.num_features = model, num_features
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, _channels(values))
            self.register_buffer(f"data_{name}", _channels(getattr(info, name)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(self.normalized(x))
        return features

    def normalized(self, x: Tensor) -> Tensor:
        """Images as the model sees them, float32, from images normalized by the data set's mean and std."""
        return x * (self.data_std / self.std) + (self.data_mean - self.mean) / self.std

    def constants(self) -> dict[str, list[float]]:
        """The mean and standard deviation of pixels / 255 that its weights know, three numbers each."""
        return {name: [round(value, 6) for value in getattr(self, name).flatten().tolist()] for name in ("mean", "std")}

    def depths(self) -> list[list[str]]:
        """Names of modules and parameters from the images to the features, by timm's own groups."""
        from timm.models import group_parameters

        matcher: Any = self.model.group_matcher
        groups = group_parameters(self.model, matcher(coarse=False), reverse=False)
        return [_prefixes(self.model, set(names), "model.") for _, names in sorted(groups.items())]


class MappedBackbone(Backbone):
    """One whose features are an average over places."""

    def maps(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, d, h, w), before pooling, and before what normalizes the features where that is after."""
        return _by_channel(self.model, self.model.forward_features(self.normalized(x)))  # type: ignore[operator]


def build_backbone(
    name: str, info: Info, bn_momentum: float, stem: str, normalize: str, checkpointing: bool
) -> Backbone:
    """timm's network of that name, which may carry the tag of weights ("resnet18.a1_in1k"), as initialized.

    Args: as `build_net`'s.
    Raises: UserError for a name that does not exist, an option that the network does not have, and images too small.
    """
    model = make_model(name, info.resolution)
    net = f"net={PREFIX}{name}"
    if stem == "small":
        make_small_stem(model, net)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = bn_momentum
    if checkpointing:
        if norms:
            raise UserError(
                f"net.checkpointing computes activations twice, and with them the statistics of BatchNorm, which {net} "
                "has. Leave it out, or use a network without."
            )
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(f"timm has no gradient checkpointing for {net}. Leave net.checkpointing out.") from None
    constants = (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    mean, std = constants if normalize == "weights" else (info.mean, info.std)
    features, has_maps = _probe(model, info.resolution, net)
    return (MappedBackbone if has_maps else Backbone)(model, features, info, mean, std)


def make_model(name: str, resolution: int, pretrained: bool = False) -> Any:
    """timm's own model without a head, for images of that size. Raises: UserError for a name that does not exist."""
    timm = import_timm()
    tagged = timm.list_models(pretrained=True)
    known = dict.fromkeys([*timm.list_models(), *tagged])
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=NEAR, cutoff=0.5)
        hint = f" Did you mean {' or '.join(f'{PREFIX}{other}' for other in near)}?" if near else ""
        raise UserError(f"Unknown net '{PREFIX}{name}'.{hint} timm has {len(known):,}: timm.list_models() names them.")
    sized = {"img_size": resolution} if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
    except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
        if pretrained:
            raise
        raise _too_small(f"net={PREFIX}{name}", resolution, error) from None


def make_small_stem(model: nn.Module, net: str) -> None:
    """Make the first convolution one of 3x3 and stride 1, and leave max-pool out: for images of 32 or 64 px.

    Raises: UserError for a network whose stem is no convolution of stride 2: that cuts patches, say.
    """
    name: Any = model.pretrained_cfg["first_conv"]  # type: ignore[index]
    conv = model.get_submodule(name) if isinstance(name, str) else None
    pools = [at for at, module in model.named_modules() if isinstance(module, nn.MaxPool2d)]
    kind = (conv.kernel_size, conv.stride) if isinstance(conv, nn.Conv2d) else None
    if kind not in (((7, 7), (2, 2)), ((3, 3), (2, 2))) or len(pools) > 1 or not all(at in STEM_POOLS for at in pools):
        raise UserError(
            f"net.stem=small is for a stem that is a convolution of stride 2, with or without a max-pool; {net} has "
            "none. Leave it out."
        )
    assert isinstance(conv, nn.Conv2d)
    if conv.kernel_size == (3, 3):
        conv.stride = (1, 1)
    else:
        small = nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
        model.set_submodule(name, small)
    for at in pools:
        model.set_submodule(at, nn.Identity())


STEM_POOLS = ("maxpool", "features.pool0")  # of residual and of dense networks


@torch.no_grad()
def _probe(model: nn.Module, resolution: int, net: str) -> tuple[int, bool]:
    """The size d of the features of one image, and whether there are maps (n, d, h, w) of them."""
    image = torch.zeros(1, 3, resolution, resolution)
    training = model.training
    try:
        features, maps = model.eval()(image), _by_channel(model, model.forward_features(image))  # type: ignore[operator]
    except (RuntimeError, ValueError, AssertionError) as error:
        raise _too_small(net, resolution, error) from None
    finally:
        model.train(training)
    if features.dim() != 2:
        raise UserError(f"{net} gives features of shape {tuple(features.shape)}, needed (n, d). Use another network.")
    return features.shape[1], maps.dim() == 4 and maps.shape[1] == features.shape[1]


def _too_small(net: str, resolution: int, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{net} takes no images of {resolution} px ({reason}). Build the data larger, or use another net.")


def _by_channel(model: Any, maps: Tensor) -> Tensor:
    """Maps as (n, d, h, w), which some models have as (n, h, w, d)."""
    return maps.permute(0, 3, 1, 2) if maps.dim() == 4 and getattr(model, "output_fmt", "") == "NHWC" else maps


def _channels(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def _prefixes(module: nn.Module, names: set[str], prefix: str) -> list[str]:
    """The fewest submodules and parameters that hold the parameters of these names and no others, in their order."""
    found = [prefix + name for name, _ in module.named_parameters(recurse=False) if name in names]
    for child, inner in module.named_children():
        held = {f"{child}.{name}" for name, _ in inner.named_parameters()}
        if held and held <= names:
            found.append(prefix + child)
        elif held & names:
            rest = {name.removeprefix(f"{child}.") for name in names if name.startswith(f"{child}.")}
            found += _prefixes(inner, rest, f"{prefix}{child}.")
    return found
