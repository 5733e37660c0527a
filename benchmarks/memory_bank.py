"""A step of the memory bank: the fused kernel against a loop over samples, as research code has it.

    python -m benchmarks.memory_bank

Both take n candidates into a full bank of K classes with S = 128 slots, all of them confident enough to replace an
entry (the most work a push can be), and both leave the prototypes of all classes up to date. Before each timed call
the stored confidences are lowered again, outside of the clock. The two must end with the same bank.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.common import report
from semi_fast.memory_bank import MemoryBank

CASES = ((10, 128, 128), (100, 128, 128), (127, 512, 2048))  # K, n, d
SIZE = 128
CALLS = 50  # calls of the kernel in a round: one alone is too short for the clock


class LoopBank:
    """The same rule, sample by sample, in plain PyTorch."""

    def __init__(self, bank: MemoryBank) -> None:
        self.embeddings, self.confidences = bank.embeddings.clone(), bank.confidences.clone()
        self.rows, self.counts = bank.rows.clone(), bank.counts.clone()
        self.prototypes = bank.prototypes()[0].clone()

    def push(self, candidates: Tensor, classes: Tensor, confidences: Tensor, mask: Tensor, rows: Tensor) -> None:
        for i in range(candidates.shape[0]):
            if not mask[i]:
                continue
            k = classes[i].item()
            slot = self.counts[k].item()
            if slot < self.embeddings.shape[1]:
                self.counts[k] += 1
            else:
                slot = self.confidences[k].argmin().item()
                if confidences[i] <= self.confidences[k, slot]:
                    continue
            self.embeddings[k, slot] = candidates[i]
            self.confidences[k, slot] = confidences[i]
            self.rows[k, slot] = rows[i]
        for k in classes.unique().tolist():
            self.prototypes[k] = self.embeddings[k, : self.counts[k]].mean(0)


def measure(num_classes: int, rows: int, width: int, rounds: int) -> dict[str, object]:
    """Median microseconds of one step of both, taking turns; one case of the report."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(num_classes, width, size=SIZE, decay_every=10**9)
    full = torch.arange(num_classes).repeat_interleave(SIZE)
    low_start = torch.rand(full.shape[0], generator=generator) * 0.5
    everything = torch.ones(full.shape[0], dtype=torch.bool)
    bank.push(torch.randn(full.shape[0], width, generator=generator), full, low_start, everything, full)
    low = bank.confidences.clone()
    loop = LoopBank(bank)
    step = (
        torch.randn(rows, width, generator=generator),
        torch.randint(num_classes, (rows,), generator=generator),
        torch.rand(rows, generator=generator) * 0.3 + 0.7,
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
    )

    kernel_times, loop_times = [], []
    for _ in range(rounds):
        loop.confidences.copy_(low)
        loop_times.append(timed(lambda: loop.push(*step)))
        once = []
        for _ in range(CALLS):
            bank.confidences.copy_(low)
            once.append(timed(lambda: bank.push(*step)))
        kernel_times.append(statistics.median(once))
    if not torch.equal(bank.embeddings, loop.embeddings):
        raise AssertionError("kernel and loop disagree on the stored embeddings")
    torch.testing.assert_close(bank.prototypes()[0], loop.prototypes, rtol=0, atol=1e-4)
    kernel, reference = statistics.median(kernel_times[1:]), statistics.median(loop_times[1:])
    return {
        "K": num_classes,
        "n": rows,
        "d": width,
        "kernel_us": round(kernel * 1e6, 1),
        "loop_us": round(reference * 1e6, 1),
        "ratio": round(reference / kernel, 1),
    }


def timed(call) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    report("memory_bank", {"cases": [measure(*case, rounds=9) for case in CASES]})


if __name__ == "__main__":
    main()
