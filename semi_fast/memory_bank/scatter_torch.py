"""The bank's push in plain tensor operations, for devices that have no kernel of their own.

Same outcome as the CPU kernel, and like it without waiting for the device; but it launches a dozen small operations a
candidate, where a kernel needs one launch a step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def push(
    embeddings: Tensor,
    confidences: Tensor,
    rows: Tensor,
    sums: Tensor,
    pushed: Tensor,
    steps: Tensor,
    candidates: Tensor,
    classes: Tensor,
    scores: Tensor,
    mask: Tensor,
    sources: Tensor,
    beta: float,
    decay_every: int,
    fifo: bool,
    resum_every: int,
) -> None:
    """Push, decay and prototype upkeep of one step; see ``semi_fast.memory_bank.bank.push`` for shapes and meaning."""
    num_classes, size, width = embeddings.shape
    slots = torch.arange(size, device=embeddings.device)
    flat_embeddings, flat_confidences = embeddings.view(num_classes * size, width), confidences.view(-1)
    flat_rows = rows.view(-1)
    before = pushed.clone()
    for row in range(classes.shape[0]):
        on = mask[row : row + 1]
        k = torch.where(on, classes[row : row + 1], 0)  # what a masked-out candidate says is not read
        taken = pushed.index_select(0, k)
        full = taken >= size
        if fifo:
            slot, accepted = taken % size, on
        else:
            line = confidences.index_select(0, k)[0]
            lowest = line.amin()
            first = torch.where(line == lowest, slots, size).amin()
            slot, accepted = torch.where(full, first, taken), on & (~full | (scores[row] > lowest))
        place = k * size + slot
        old, new, total = flat_embeddings.index_select(0, place), candidates[row : row + 1], sums.index_select(0, k)
        exchanged = torch.where(full, (total - old) + new, total + new)
        sums.index_copy_(0, k, torch.where(accepted, exchanged, total))
        flat_embeddings.index_copy_(0, place, torch.where(accepted, new, old))
        kept = flat_confidences.index_select(0, place)
        flat_confidences.index_copy_(0, place, torch.where(accepted, scores[row : row + 1], kept))
        kept = flat_rows.index_select(0, place)
        flat_rows.index_copy_(0, place, torch.where(accepted, sources[row : row + 1], kept))
        pushed.index_add_(0, k, accepted.long())

    due = before // resum_every != pushed // resum_every
    exact = embeddings.sum(1, dtype=torch.float64).float()
    sums.copy_(torch.where(due.unsqueeze(1), exact, sums))
    steps += 1
    decayed = torch.where(steps % decay_every == 0, torch.full_like(sums[:, 0], beta), 1.0)
    confidences *= decayed.unsqueeze(1)
