"""DARP's refinement of a table of pseudo-labels towards given class counts, by one vector of multipliers.

Source: Kim et al., "Distribution Aligning Refinery of Pseudo-label for Imbalanced Semi-supervised Learning" (NeurIPS
2020), Algorithm 1 and its released code (bbuing9/DARP). There the solution X (m, K) is found by coordinate ascent with
a search for each class. Here it is written as X_nk = softmax_k(ln A_nk - H_n nu_k), which is the same point of the same
convex problem, and nu (K,) is found by Newton's method on the dual, all of it on the device.

A table has m images and K classes; the class counts c (K,) sum to m. All tables are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # of the released code, on scales, probabilities and logarithms


@torch.no_grad()
def clean(table: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """A: of each class only its most probable images, scaled to the class's count; rows normalized.

    Args:
        table: Q, (m, K), rows sum to 1.
        counts: c, (K,).
        alpha: floor(alpha c_k) images are kept of class k; of equal ones the first.

    Returns: (m, K) above 0; a row that no class has kept is uniform.
    """
    order = table.t().sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(len(table), device=table.device)
    kept = (rank < (alpha * counts).floor().unsqueeze(1)).to(table.dtype)
    masked = table * torch.zeros_like(order, dtype=table.dtype).scatter_(1, order, kept).t()
    scale = (counts + FLOOR) / (masked.sum(0) + FLOOR)
    scaled = masked * scale + FLOOR
    return scaled / scaled.sum(1, keepdim=True)


@torch.no_grad()
def uncertainty(cleaned: Tensor) -> Tensor:
    """H_n = -sum_k A_nk ln(A_nk + 1e-6): by how much an image may move. (m, K) -> (m, 1)."""
    return -(cleaned * (cleaned + FLOOR).log()).sum(1, keepdim=True)


@torch.no_grad()
def refined(cleaned: Tensor, multipliers: Tensor) -> Tensor:
    """Rows of X, of any rows of A. (b, K), nu (K,) -> (b, K), rows sum to 1."""
    return (cleaned.log() - uncertainty(cleaned) * multipliers).softmax(1)


@torch.no_grad()
def solve(cleaned: Tensor, counts: Tensor, multipliers: Tensor, sweeps: int) -> Tensor:
    """nu with sum_n X_nk = c_k: so many damped steps of Newton's method from a former nu.

    The dual is convex: its gradient is c - sum_n X_n, its Hessian sum_n H_n (diag X_n - X_n X_n'). A step d is
    shortened to ln(1 + r) / r of itself, r = max H (max d - min d): functions of this kind ("quasi-self-concordant")
    fall at each such step, and close to the solution the steps are whole. Where only images that hardly move are left,
    the solution is far away: the longest of 8, 64 and 512 times that step is taken that the dual still falls along.

    Args:
        cleaned: A, (m, K). counts: c, (K,). multipliers: the former nu, (K,). sweeps: Newton steps.

    Returns: (K,) of mean 0; the former nu where the new one is not finite.
    """
    log, H = cleaned.log(), uncertainty(cleaned)

    def rows(nu: Tensor) -> Tensor:
        return (log - H * nu.float()).softmax(1)

    def surplus(nu: Tensor) -> Tensor:
        return rows(nu).sum(0, dtype=torch.float64) - counts

    nu, most = multipliers.double(), H.max().double()
    identity = torch.eye(len(nu), dtype=torch.float64, device=nu.device)
    for _ in range(sweeps):
        X = rows(nu)
        weighted = H * X
        curvature = (torch.diag(weighted.sum(0)) - X.t() @ weighted).double()
        # What all nu have in common is free: a constant fixes it. A little ridge where no image can move any more.
        size = curvature.diagonal().mean()
        factor = torch.linalg.cholesky_ex(curvature + size / len(nu) + (1e-6 * size + 1e-12) * identity).L
        step = torch.cholesky_solve((X.sum(0, dtype=torch.float64) - counts).unsqueeze(1), factor).squeeze(1)
        reach = (most * (step.max() - step.min())).clamp_min(1e-12)
        step = step * torch.log1p(reach) / reach
        length = torch.ones_like(reach)
        for longer in (8, 64, 512):
            length = torch.where(surplus(nu + longer * step) @ step >= 0, float(longer), length)
        nu = nu + length * step
    nu = nu - nu.mean()
    return torch.where(nu.isfinite().all(), nu, multipliers.double()).float()
