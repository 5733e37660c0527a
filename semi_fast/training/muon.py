"""Muon: momentum SGD whose steps are orthogonalized, for convolutions. And torch's optimizers without a compiler."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

# Of the quintic iteration, and how often it is done: Jordan's, which torch.optim.Muon has, too.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer's class whose methods do not arrange for being compiled, which no step here is.

    For that torch's import their whole compiler, a second of every start, and go through it at every call.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    bare = {name: torch.no_grad()(inspect.unwrap(getattr(kind, name))) for name in names}
    return type(kind.__name__, (kind,), bare)


class Muon(without_compiler(torch.optim.SGD)):  # type: ignore[misc]
    """Fused SGD, but for weights of convolutions, whose Nesterov step is orthogonalized first.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). A weight (out, in, h, w) is
    the matrix (out, in h w); what is subtracted is the rate times the orthogonalized step, of spectral norm about 1,
    times sqrt(max(1, out / (in h w))). Choice: what has four dimensions is a convolution; tokens and embeddings of
    positions, (1, N, D), and all else are SGD's. As with SGD, weight decay is added to the gradient. torch.optim.Muon
    takes matrices alone, reads the rate on the host, so that no step can be recorded, and cannot leave a step out
    (`found_inf`).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step; none where `found_inf` is set. Takes no closure. Never waits for the device."""
        done = {}
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                if weight.dim() == 4 and gradient is not None:
                    self._orthogonal_step(weight, gradient, group)
                    done[weight], weight.grad = gradient, None  # SGD passes by what has no gradient
        super().step()
        for weight, gradient in done.items():
            weight.grad = gradient

    def _orthogonal_step(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        scale, skipped = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        gradient = gradient if scale is None else gradient / scale
        gradient = gradient.add(weight, alpha=group["weight_decay"])
        before = self.state[weight]["momentum_buffer"]
        buffer = before * group["momentum"] + gradient
        step = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
        after = weight - group["lr"] * orthogonalize(step.flatten(1)).view(step.shape)
        if skipped is not None:
            after, buffer = (torch.where(skipped > 0, *pair) for pair in ((weight, after), (before, buffer)))
        weight.copy_(after)
        before.copy_(buffer)


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix (m, n) with singular vectors kept and singular values near sqrt(max(1, m / n)); in bfloat16 within.

    Five Newton-Schulz iterations bring the values into about 0.7 to 1.2, which trains as well as 1 would.
    """
    a, b, c = QUINTIC
    m, n = matrix.shape
    x = matrix if m <= n else matrix.T
    x = (x / x.norm().clamp_min(1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x if m <= n else x.T
    return x.to(matrix.dtype) * max(1, m / n) ** 0.5
