"""A step of the memory bank: the fused kernel against a loop over samples, as research code has it.

    python -m benchmarks.memory_bank            one JSON line
    python -m benchmarks.memory_bank --table    a push against K, S, n and d, as Markdown, and docs/bank.png

Both take n candidates into a full bank of K classes with S = 128 slots, all of them confident enough to replace an
entry (the most work a push can be), and both leave the prototypes of all classes up to date. Before each timed call
the stored confidences are lowered again, outside of the clock. The two must end with the same bank.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import Turn, fastest, hardware, in_turns, options, report, timed
from semi_fast.memory_bank import MemoryBank

CASES = ((10, 128, 128), (100, 128, 128), (127, 512, 2048))  # K, n, d
SIZE = 128
BASE = {"K": 100, "S": 128, "n": 128, "d": 512}  # of the table: one of them varies at a time
SWEPT = {
    "K": (10, 30, 100, 300, 1000),
    "S": (16, 32, 64, 128, 256),
    "n": (32, 64, 128, 256, 512, 1024),
    "d": (128, 256, 512, 1024, 2048),
}
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "bank.png"
TURN = 0.002  # seconds of the kernel in a turn: a call alone is too short for the clock


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


def full_bank(num_classes: int, size: int, width: int, device: str = "cpu") -> tuple[MemoryBank, Tensor]:
    """A full bank that accepts whatever `confident` offers, and its confidences."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(num_classes, width, size=size, decay_every=10**9).to(device)
    full = torch.arange(num_classes).repeat_interleave(size)
    low_start = torch.rand(full.shape[0], generator=generator) * 0.5
    everything = torch.ones(full.shape[0], dtype=torch.bool)
    rows = torch.randn(full.shape[0], width, generator=generator)
    bank.push(*(part.to(device) for part in (rows, full, low_start, everything, full)))
    return bank, bank.confidences.clone()


def confident(rows: int, num_classes: int, width: int) -> tuple[Tensor, ...]:
    """Candidates of random classes, all more confident than any entry of `full_bank`."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, width, generator=generator),
        torch.randint(num_classes, (rows,), generator=generator),
        torch.rand(rows, generator=generator) * 0.3 + 0.7,
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
    )


def measure(arguments: argparse.Namespace) -> None:
    """Push into the banks of all CASES, check that kernel and loop end with the same, and print the JSON line."""
    cases: dict[str, Turn] = {}
    pairs: list[tuple[MemoryBank, LoopBank]] = []
    for K, n, d in CASES:
        bank, low = full_bank(K, SIZE, d)
        loop, step = LoopBank(bank), confident(n, K, d)
        cases[f"kernel {K} x {n} x {d}"] = push(bank, low, step, least=TURN)
        cases[f"loop {K} x {n} x {d}"] = push(loop, low, step)
        pairs.append((bank, loop))
    times = in_turns(cases, arguments.rounds, arguments.seconds)
    for bank, loop in pairs:
        if not torch.equal(bank.embeddings, loop.embeddings) or not torch.equal(bank.rows, loop.rows):
            raise AssertionError("kernel and loop disagree on the stored entries")
        torch.testing.assert_close(bank.prototypes()[0], loop.prototypes, rtol=0, atol=1e-4)
    sizes = [f"{K} x {n} x {d}" for K, n, d in CASES]
    ratios = {size: fastest(times[f"loop {size}"]) / fastest(times[f"kernel {size}"]) for size in sizes}
    report("memory_bank", ratios, times, "push", sizes="K x n x d")


def push(bank: MemoryBank | LoopBank, low: Tensor, step: tuple[Tensor, ...], least: float = 0.0) -> Turn:
    """A turn of pushes, ahead of each of which the stored confidences are lowered."""
    return timed(lambda: bank.push(*step), before=lambda: bank.confidences.copy_(low), least=least)


def push_times(arguments: argparse.Namespace, device: str) -> dict[str, dict[int, float]]:
    """Microseconds of a push into a full bank that takes all candidates in, by what varies and its value."""
    found: dict[str, dict[int, float]] = {}
    for key, values in SWEPT.items():
        cases = {}
        for value in values:
            sizes = {**BASE, key: value}
            bank, low = full_bank(sizes["K"], sizes["S"], sizes["d"], device)
            step = tuple(part.to(device) for part in confident(sizes["n"], sizes["K"], sizes["d"]))
            cases[str(value)] = push(bank, low, step, least=TURN)
        times = in_turns(cases, arguments.rounds, arguments.seconds)
        found[key] = {value: round(1e6 * fastest(times[str(value)]), 1) for value in values}
    return found


def table(times: dict[str, dict[int, float]]) -> str:
    """One line for each of K, S, n and d."""
    base = ", ".join(f"{key} = {value}" for key, value in BASE.items())
    lines = [f"| varied (else {base}) | microseconds of a push |", "|---|---|"]
    for key, line in times.items():
        lines.append(f"| {key} | " + ", ".join(f"{value}: {time:.0f}" for value, time in line.items()) + " |")
    return "\n".join(lines)


def draw(times: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """The table as a picture: a panel for each of K, S, n and d, both axes logarithmic, with what "linear" would be."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, len(times), figsize=(12, 3.4), sharey=True, layout="constrained")
    names = {"K": "classes K", "S": "slots of a class S", "n": "candidates n", "d": "features d"}
    for axis, (key, line) in zip(axes, times.items(), strict=True):
        values, micros = list(line), list(line.values())
        axis.plot(values, micros, "o-", color="#1b6ca8", label="measured")
        if key in "nd":
            axis.plot(values, [micros[-1] * v / values[-1] for v in values], "--", color="#999999", label="linear")
        axis.set(xscale="log", yscale="log", xlabel=names[key])
        axis.set_xticks(values, [str(value) for value in values], fontsize=8)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("microseconds of a push")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = options(__doc__, rounds=50, seconds=40)
    parser.add_argument("--table", action="store_true", help="a push against K, S, n and d")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of the table: where the picture goes")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = hardware()
    where = str(machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads")
    times = push_times(arguments, device)
    base = ", ".join(f"{key} = {value}" for key, value in BASE.items())
    draw(times, arguments.picture, f"One push, every candidate taken in, on {where} (where not varied: {base})")
    print(table(times))
    report("memory_bank", base=BASE, push_us=times, device=where)


if __name__ == "__main__":
    main()
