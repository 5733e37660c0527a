"""DARP's refinement of a table of pseudo-labels towards given class counts, by one vector of multipliers.

Source: Kim et al., "Distribution Aligning Refinery of Pseudo-label for Imbalanced Semi-supervised Learning" (NeurIPS
2020), Algorithm 1 and its released code (bbuing9/DARP). There the solution X (m, K) is found by coordinate ascent with
a search for each class. Here it is written as X_nk = softmax_k(ln A_nk - H_n nu_k), which is the same point of the same
convex problem, and nu (K,) is found by Newton's method on the dual, for all classes at once and on the device.

A table has m images and K classes; the class counts c (K,) sum to m. All tables are float32. Inside, the numbers of a
class lie side by side, and so many are worked on at a time as stay in a processor's cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from semi_fast.parts.bf16 import has_bf16

FLOOR = 1e-6  # of the released code, on scales, probabilities and logarithms
BLOCK = 2**19  # numbers worked on at a time
SHORT = 2**15 - 1  # the highest int16


@torch.no_grad()
def clean(table: Tensor, counts: Tensor, alpha: float) -> Tensor:
    """A: of each class only its most probable images, scaled to the class's count; rows normalized.

    Args:
        table: Q, (m, K), rows sum to 1.
        counts: c, (K,).
        alpha: floor(alpha c_k) images are kept of class k; of equal ones the first.

    Returns: (m, K) above 0, class by class in memory; a row that no class has kept is uniform.
    """
    columns = table.t().clone(memory_format=torch.contiguous_format)
    together = max(1, BLOCK // len(table))
    for mine, count in zip(columns.split(together), counts.unsqueeze(1).split(together), strict=True):
        mine.mul_(_highest(mine, (alpha * count).floor()))
        mine.mul_((count + FLOOR) / (mine.sum(1, keepdim=True) + FLOOR)).add_(FLOOR)
    return columns.div_(columns.sum(0)).t()


def _highest(columns: Tensor, number: Tensor) -> Tensor:
    """1.0 for the so many highest numbers of each row, of equal ones the first, 0.0 for the others.

    Numbers in [0, 2) are in the order of their 30 bits, so the highest level that so many reach is found bit by bit,
    with no sort, whose time a table of many classes is mostly made of, and without asking the host. The upper and the
    lower 15 bits are searched one after the other, as int16 is compared and counted twice as fast.

    Args:
        columns: (b, m). number: (b, 1), whole numbers. Counts are exact up to 2^24 images.
    """
    rows, images = columns.shape
    parts = -(-images // SHORT)  # a part is counted in int16
    keys = torch.full((rows, parts, -(-images // parts)), -1, dtype=torch.int16, device=columns.device)
    bits, mine = columns.view(torch.int32), keys.view(rows, -1)[:, :images]
    mine.copy_(bits >> 15)
    upper = _reached(keys, number).int() << 15
    mine.copy_((bits - upper).clamp_(-1, SHORT))
    level = (upper + _reached(keys, number)).view(torch.float32)
    above = torch.gt(columns, level, out=torch.empty_like(columns))
    spare = number - above.sum(1, keepdim=True)
    equal = torch.eq(columns, level, out=torch.empty_like(columns))
    place = equal.cumsum(1)
    return above.add_(equal.mul_(torch.le(place, spare, out=place)))


def _reached(keys: Tensor, number: Tensor) -> Tensor:
    """The highest of 0 to 2^15 - 1 that so many keys reach. (b, parts, n) int16, (b, 1) -> (b, 1) int16."""
    level, reach = torch.zeros_like(number, dtype=torch.int16), torch.empty_like(keys)
    for bit in reversed(range(15)):
        trial = level | 1 << bit
        count = torch.ge(keys, trial.unsqueeze(2), out=reach).sum(2, dtype=torch.int16).sum(1, keepdim=True)
        level = torch.where(count >= number, trial, level)
    return level


@torch.no_grad()
def uncertainty(cleaned: Tensor) -> Tensor:
    """H_n = -sum_k A_nk ln(A_nk + 1e-6): by how much an image may move. (m, K) -> (m, 1)."""
    return -(cleaned * (cleaned + FLOOR).log()).sum(1, keepdim=True)


@torch.no_grad()
def refined(cleaned: Tensor, multipliers: Tensor) -> Tensor:
    """Rows of X, of any rows of A. (b, K), nu (K,) -> (b, K), rows sum to 1."""
    return (cleaned.log() - uncertainty(cleaned) * multipliers).softmax(1)


@torch.no_grad()
def solve(cleaned: Tensor, counts: Tensor, multipliers: Tensor, length: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """nu with sum_n X_nk = c_k: the best of so many that are tried, a pass over the table each.

    The dual is convex: its gradient is c - sum_n X_n, its Hessian sum_n H_n (diag X_n - X_n X_n'). Along a step of
    Newton's method it falls as long as its slope is negative, so a nu behind whose step it rises at most half as much
    as it fell before counts as better. After a better one the next step may be four times as long, up to a whole one
    or, where the dual still falls steeply, longer; after another one an eighth of the step is tried. Where only images
    that hardly move are left, nu is far away and whole steps are far too long, which is why the length is remembered.

    Args:
        cleaned: A, (m, K); fastest as `clean` returns it. counts: c, (K,). multipliers: the former nu, (K,).
        length: of the former steps, 0-dim, 1 at the start. sweeps: nu tried, the former one among them.

    Returns: nu, (K,) of mean 0, the former one where nothing is finite; and the length of the steps.
    """
    A = cleaned.t()
    c, space = counts.double(), torch.empty(max(BLOCK, len(A)), device=A.device)
    H = _uncertainties(A, space)
    best = trial = multipliers.double()
    step, before = torch.zeros_like(best), torch.zeros_like(best[0])
    for sweep in range(sweeps):
        totals, curvature = _moments(A, H, trial, space, curved=sweep < sweeps - 1)
        slope = torch.nan_to_num((totals - c) @ step, nan=-torch.inf)
        better = slope >= -0.5 * before
        if sweep:
            longer = torch.where(slope > 0.5 * before, 4 * length, (4 * length).clamp_max(1.0))
            length = torch.where(better, longer, length / 8)
        newton = _newton(curvature, totals - c)
        best, step = torch.where(better, trial, best), torch.where(better, newton, step)
        before = torch.where(better, (totals - c) @ newton, before)
        trial = best + length * step
    return (best - best.mean()).float(), length


def _uncertainties(columns: Tensor, space: Tensor) -> Tensor:
    """`uncertainty`, a block at a time. (K, m) -> (m,)."""
    H, together = torch.empty_like(columns[0]), max(1, BLOCK // len(columns))
    for mine, its_H in zip(columns.split(together, 1), H.split(together), strict=True):
        log = torch.add(mine, FLOOR, out=space[: mine.numel()].view(mine.shape)).log_()
        torch.sum(log.mul_(mine), 0, out=its_H)
    return H.neg_()


def _moments(A: Tensor, H: Tensor, nu: Tensor, space: Tensor, curved: bool) -> tuple[Tensor, Tensor]:
    """sum_n X_n, (K,), and if `curved` sum_n H_n (diag X_n - X_n X_n'), (K, K), of A, (K, m), and H, (m,).

    The products are bfloat16's where the device has such: they decide how fast, not where the sums are the counts. As
    rows of X sum to 1, what a class's have on the diagonal is the sum of what is off it, which keeps the matrix
    positive for any rounding.
    """
    totals, products = torch.zeros_like(nu), torch.zeros(len(nu), len(nu), dtype=nu.dtype, device=nu.device)
    # With these no factor is above 1; and A is 1e-14 at least, so that no row vanishes for float32.
    shifted = ((nu.min() - nu) / math.log(2)).float().unsqueeze(1)
    together, dtype = max(1, BLOCK // len(A)), torch.bfloat16 if has_bf16(A.device) else torch.float32
    for mine, its_H in zip(A.split(together, 1), H.split(together), strict=True):
        X = torch.mul(shifted, its_H, out=space[: mine.numel()].view(mine.shape)).exp2_().mul_(mine)
        scale = X.sum(0).reciprocal_()
        totals += X.mul_(scale).sum(1)
        if curved:
            Y = X.mul_(its_H.clamp_min(0).sqrt()).to(dtype)  # H of a certain image is -1e-6 at least
            products += Y @ Y.t()
    products = products.tril(-1)
    products += products.t().clone()
    return totals, torch.diag(products.sum(1)) - products


def _newton(curvature: Tensor, surplus: Tensor) -> Tensor:
    """The step of Newton's method, (K,)."""
    # What all nu have in common is free: a constant fixes it. A little ridge where no image can move any more.
    diagonal = curvature.diagonal()
    curvature = curvature + diagonal.mean() / len(surplus) + torch.diag(1e-6 * diagonal + 1e-12)
    return torch.cholesky_solve(surplus.unsqueeze(1), torch.linalg.cholesky_ex(curvature).L).squeeze(1)
