"""Weights to start from: a file of safetensors for any network, or timm's own download. Nothing is ever unpickled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import sha256_of
from semi_fast.nets.backbone import PREFIX, Backbone, make_model

PRETRAINED = "pretrained"  # the word for timm's own weights
NAMED = 4  # tensors that an error names
HEADS = ("fc", "head", "classifier")  # how the classifier is called where nothing says it
COUNT = "num_batches_tracked"  # of BatchNorm, which nothing reads


def load_weights(net: nn.Module, name: str, weights: str, resolution: int) -> str:
    """Copy weights into a network; a classifier among them is left out.

    Args:
        net: built by `build_net` for that name and for images of that resolution.
        weights: a file in the format safetensors, tensors by the network's (or timm's) names; or "pretrained".

    Returns: a line about what was loaded, what was left out, and what was adapted.
    Raises: UserError, before anything is copied, where they cannot be had, or do not fit: the names are in it.
    """
    tensors = download(name, resolution) if weights == PRETRAINED else read_weights(Path(weights))
    if any(key.startswith(("net.", "heads.")) for key in tensors):
        raise UserError(f"net.weights={weights} is a run's checkpoint. Set start_from to the run's folder instead.")
    target = net.model if isinstance(net, Backbone) else net
    head = {key: tensor for key, tensor in tensors.items() if key.startswith(_head_prefixes(target))}
    given = {key: tensor for key, tensor in tensors.items() if key not in head and not key.endswith(COUNT)}
    wanted = {key: tensor for key, tensor in target.state_dict().items() if not key.endswith(COUNT)}
    given, adapted = _adapt(target, wanted, given)
    problems = misfits(wanted, given)
    if problems:
        raise UserError(
            f"net.weights={weights} does not fit net={name}: {problems}. Those are weights of another architecture: "
            "name the net that they are of."
        )
    broken = [key for key in sorted(wanted) if not given[key].to(wanted[key].dtype).isfinite().all()]
    if broken:
        raise UserError(
            f"net.weights={weights} has NaN or infinite values in {described({'tensors': broken})}. They come from "
            "training that diverged, or a damaged file: give other weights."
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(given[key])
    classes = {len(tensor) for tensor in head.values() if tensor.dim() > 0}
    left = f"the head of {', '.join(f'{n:,}' for n in sorted(classes))} classes ({', '.join(head)})" if head else ""
    notes = [f"left out: {left}"] if left else []
    return "; ".join([f"weights: {len(wanted)} tensors of {weights}", *notes, *adapted])


def check_file(path: Path) -> str:
    """The SHA-256 of a file of weights. Raises: UserError for a pickle, and where there is no such file."""
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar"):
        raise UserError(
            f"net.weights={path} is a pickle, which runs whatever its author put into it, and is never opened. Convert "
            "it where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')."
        )
    if not path.is_file():
        raise UserError(f"net.weights={path}: there is no such file. Name one, or 'pretrained' for a timm/ net.")
    return sha256_of(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU. Raises: UserError for any other file."""
    check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"net.weights={path} is no safetensors file, or a damaged one ({reason}).") from None


def download(name: str, resolution: int) -> dict[str, Tensor]:
    """timm's own weights for that network, fitted by timm to images of that size.

    Raises: UserError for a net that is not timm's or has none, and where they cannot be fetched.
    """
    if not name.startswith(PREFIX):
        raise UserError(f"net.weights={PRETRAINED} is for timm/<name>, got net={name}. Name a safetensors file.")
    with torch.random.fork_rng(devices=[]):
        try:
            tensors: dict[str, Tensor] = make_model(name.removeprefix(PREFIX), resolution, True).state_dict()
        except UserError:
            raise
        # Of the network's many libraries each has classes of its own for what may go wrong.
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise UserError(
                f"timm's weights for net={name} cannot be had: {reason}. Where there is no network, name a safetensors "
                "file by net.weights."
            ) from None
    return tensors


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What keeps tensors from being copied, the first of them by name: "" where all fit."""
    shapes = [
        f"{name} is {tuple(given[name].shape)}, needed {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & given.keys())
        if given[name].shape != wanted[name].shape
    ]
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    return described({"missing": missing, "unexpected": extra, "of another shape": shapes})


def described(names: Mapping[str, Sequence[str]]) -> str:
    """The first of the names under each heading: "missing: a, b; unexpected: c, d, e, f and 3 more"."""
    some = {what: f" and {len(those) - NAMED} more" if len(those) > NAMED else "" for what, those in names.items()}
    return "; ".join(f"{what}: {', '.join(those[:NAMED])}{some[what]}" for what, those in names.items() if those)


def smaller_kernel(weight: Tensor, size: int) -> Tensor:
    """A convolution's kernel for images that are smaller: (o, i, K, K) -> (o, i, size, size), size <= K.

    Each new weight is the sum of the old ones over its share of their area, so that the kernel answers to an image as
    the old one does to the same image with each pixel made a square of K / size pixels.
    """
    old = weight.shape[-1]
    edges = torch.arange(size + 1, dtype=torch.float64) * old / size
    cells = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
    share = overlap.clamp_min(0)
    return (share @ weight.double() @ share.T).to(weight.dtype)


def _adapt(
    model: nn.Module, wanted: Mapping[str, Tensor], given: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors for other sizes of images made to fit: a stem's kernel, and a transformer's positions; lines about it."""
    first = f"{_facts(model).get('first_conv')}.weight"
    lines, fitted = [], dict(given)
    for key in given.keys() & wanted.keys():
        old, new = given[key].shape, wanted[key].shape
        if key == first and len(old) == 4 and old[:2] == new[:2] and old[2] == old[3] > new[2] == new[3] == 3:
            fitted[key] = smaller_kernel(given[key], 3)
            lines.append(f"{key} made 3x3 from {old[2]}x{old[3]}")
        elif key == "pos_embed" and len(old) == len(new) == 3 and old[2] == new[2] and old != new:
            from timm.layers import resample_abs_pos_embed

            tokens = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
            if math.isqrt(old[1] - tokens) ** 2 != old[1] - tokens:
                continue
            size: Any = model.patch_embed.grid_size  # type: ignore[union-attr]
            fitted[key] = resample_abs_pos_embed(given[key], list(size), num_prefix_tokens=tokens)
            lines.append(f"{key} of {old[1]} tokens made one of {new[1]}")
    return fitted, lines


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of a classifier's tensors begin with."""
    names = _facts(model).get("classifier") or HEADS
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _facts(model: nn.Module) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    return facts
