"""The model-only ceiling: how fast training could go if data, method and bookkeeping cost nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from pipelines import Batch
from semi_fast.config import OptimSettings
from semi_fast.methods.base import linear_head
from semi_fast.processes.gather import gather_ranks
from semi_fast.training.optim import build_optimizer

MOST_STEPS = 10  # timed at most
SECONDS = 0.5  # for all timed steps; a slow machine pays for two steps, the first of them untimed


def measure_ceiling(
    net: nn.Module,
    classes: int,
    batch: Batch,
    optim: OptimSettings,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    compiled: str | None = None,
) -> float:
    """Images per second of forward, cross-entropy, backward and update on images that are ready: B + V B_u a step.

    Everything happens on a copy of the network, and the random generators are put back: training goes on as if this
    had not been called, to the bit.

    Args:
        net: images (n, 3, H, W) -> features (n, net.num_features).
        classes: K.
        batch: a batch of the run, for its number of images, their dtype and layout.
        optim: the run's optimizer.
        autocast: makes the context of a forward, for mixed precision.
        compiled: in which mode of torch.compile the copy is compiled, as the network of the run is; None: not at all.

    Returns: images per second of this process, from the fastest step after an untimed one.
    """
    x = torch.cat([batch.x, *batch.u])
    y = batch.y.repeat(-(-len(x) // len(batch.y)))[: len(x)]
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        copied = copy.deepcopy(net)
        model = nn.Sequential(copied, linear_head(net, classes).to(x.device)).train()
    if compiled is not None:  # the code that this compiles is the run's, too: it is not compiled twice
        copied.compile(mode=compiled)
    optimizer = build_optimizer(model, optim)

    def step() -> None:
        with autocast():
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    def timed() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    step()  # allocates, picks algorithms, compiles
    seconds = [timed()]
    # Every process makes as many steps as the slowest has time for: their BatchNorms wait for each other.
    slowest = float(gather_ranks(torch.tensor(seconds, device=x.device)).max())
    more = min(MOST_STEPS, round(SECONDS / slowest)) - 1
    seconds += [timed() for _ in range(more)]
    return len(x) / min(seconds)
