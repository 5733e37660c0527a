"""The model-only ceiling: how fast training could go if data, method and bookkeeping cost nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semi_fast.config import OptimSettings
from semi_fast.parts.forward import linear_head
from semi_fast.processes.gather import gather_ranks
from semi_fast.training.optim import build_optimizer

MOST_STEPS = 10  # timed at most
SECONDS = 0.5  # for all timed steps; a slow machine pays for two steps, the first of them untimed


def measure_ceiling(
    net: nn.Module,
    classes: int,
    images: Tensor,
    optim: OptimSettings,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    compiled: str | None = None,
) -> float:
    """Images per second of forward, cross-entropy, backward and update on images that are ready.

    Everything happens on a copy of the network, and the random generators are put back: training goes on as if this had
    not been called, to the bit. All processes must call it together.

    Args:
        net: images (n, 3, H, W) -> features (n, net.num_features).
        classes: K.
        images: (N, 3, H, W), all that the network sees in a step of this process, as a batch of the run has them.
        optim: the run's optimizer.
        autocast: makes the context of a forward, for mixed precision.
        compiled: in which mode of torch.compile the copy is compiled, as the network of the run is; None: not at all.

    Returns: images per second of all processes together, each from its fastest step after an untimed one.
    """
    device = images.device
    with torch.random.fork_rng([device] if images.is_cuda else []):
        copied = copy.deepcopy(net)
        model = nn.Sequential(copied, linear_head(net, classes).to(device)).train()
    if compiled is not None:  # the code that this compiles is the run's, too: it is not compiled twice
        copied.compile(mode=compiled)
    optimizer, labels = build_optimizer(model, optim), torch.arange(len(images), device=device) % classes

    def timed() -> float:
        start = time.perf_counter()
        with autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if images.is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()  # allocates, picks algorithms, compiles
    seconds = [timed()]
    # Every process makes as many steps as the slowest has time for: their BatchNorms wait for each other.
    slowest = float(gather_ranks(torch.tensor(seconds, device=device)).max())
    seconds += [timed() for _ in range(min(MOST_STEPS, round(SECONDS / slowest)) - 1)]
    return float(gather_ranks(torch.tensor([len(images) / min(seconds)], device=device)).sum())
