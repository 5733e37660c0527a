"""BatchNorm over the batches of all processes together: normalizing, and running statistics, as one process would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from semi_fast.processes.gather import gather_ranks

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronize_batchnorm(net: nn.Module, device: torch.device) -> None:
    """Synchronize every BatchNorm within a network: by PyTorch's own on a GPU, by `SyncedBatchNorm` elsewhere.

    The parameters and buffers are the same tensors, under the same names.
    """
    for name, child in net.named_children():
        if not isinstance(child, BATCH_NORMS):
            synchronize_batchnorm(child, device)
            continue
        on_gpu = device.type == "cuda"
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_gpu else SyncedBatchNorm.like(child)
        if isinstance(getattr(child, "act", None), nn.Module):  # timm has some that activate, too
            made.act = child.act
            made.register_forward_hook(_activate)
        net.add_module(name, made)


def _activate(norm: nn.Module, _: Any, output: Tensor) -> Tensor:
    activated: Tensor = norm.act(output)  # type: ignore[operator]
    return activated


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose batch is that of all ranks: (n, C, ...) -> the same shape and dtype; n must be equal on all.

    PyTorch's SyncBatchNorm runs on GPUs alone; this one runs wherever a collective does. Each rank takes mean and
    variance of its own rows, in float32; they are gathered, in one message a layer, and combined in rank order as Chan,
    Golub & LeVeque (1979) do, so that all ranks hold the same bits and no large numbers cancel. One message more in
    backward. In eval mode it is BatchNorm itself.
    Batches are counted where `momentum` is None, which alone needs their number.
    """

    @classmethod
    def like(cls, norm: nn.modules.batchnorm._BatchNorm) -> SyncedBatchNorm:
        """One with the parameters, buffers (the same tensors, not copies) and settings of `norm`."""
        made = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        made._parameters, made._buffers = norm._parameters, norm._buffers
        return made.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            output, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
            self._update(mean, variance, count)
        return output

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        share: Tensor | float | None = self.momentum
        if share is None:  # else nothing reads the count
            self.num_batches_tracked.add_(1)
            share = 1.0 / self.num_batches_tracked.float()
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), share)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over all ranks, and the statistics it took."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        wide = x.float()
        dims = _all_but_channels(x)
        rows = x.numel() // x.shape[1]
        variance, mean = torch.var_mean(wide, dims, correction=0)
        means, variances = gather_ranks(torch.stack([mean, variance]).flatten()).unflatten(1, (2, -1)).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        scale = (variance + eps).rsqrt()
        normal = (wide - _wide(mean, x)) * _wide(scale, x)
        ctx.save_for_backward(normal, scale, weight)
        ctx.has_bias = bias is not None
        count = rows * means.shape[0]
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        output = normal if weight is None else normal * _wide(weight, x)
        output = output if bias is None else output + _wide(bias, x)
        return output.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        normal, scale, weight = ctx.saved_tensors
        dims = _all_but_channels(grad)
        wide = grad.float()
        total, along = wide.sum(dims), (wide * normal).sum(dims)
        everyone = gather_ranks(torch.stack([total, along]).flatten()).unflatten(1, (2, -1)).sum(0) / ctx.count
        factor = scale if weight is None else scale * weight
        result = (wide - _wide(everyone[0], grad) - normal * _wide(everyone[1], grad)) * _wide(factor, grad)
        # Parameters get this rank's part alone: the gradients of all ranks are averaged afterwards, as all others are.
        return result.to(grad.dtype), None if weight is None else along, total if ctx.has_bias else None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _wide(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) made to broadcast over the channels of x, (n, C, ...)."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))
