"""Draws docs/fast.png: accuracy against images through the network, of the reference and of protocol_fast.

    python -m benchmarks.fast [--points benchmarks/results/fast.csv] [--out docs/fast.png]

A line of the points is an evaluation: method, protocol, seed (and what else tells runs apart), images through the
network since the start, accuracy in percent (reported head, averaged weights), commit.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib as mpl

from benchmarks.common import RESULTS, ROOT

COLORS = {"semi": "tab:blue", "fixmatch": "tab:orange"}
LINES = {"reference": "--", "P-FAST": "-"}


def read_points(path: Path) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
    """(images, accuracy) by method, protocol and seed, in the order of the images."""
    runs: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            run = runs.setdefault((row["method"], row["protocol"], row["seed"]), [])
            run.append((int(row["images"]), float(row["accuracy"])))
    return {key: sorted(points) for key, points in runs.items()}


def draw(runs: dict[tuple[str, str, str], list[tuple[int, float]]], path: Path) -> None:
    """A line a run; of the runs of several seeds the first alone is in the legend."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    named = set()
    for (method, protocol, _), points in runs.items():
        label = None if (method, protocol) in named else f"{method}, {protocol}"
        named.add((method, protocol))
        style = {"color": COLORS[method], "ls": LINES[protocol], "marker": "o", "ms": 4}
        axes.plot(*zip(*((images / 1000, accuracy) for images, accuracy in points), strict=True), label=label, **style)
    axes.set(xlabel="thousand images through the network", ylabel="test accuracy, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=RESULTS / "fast.csv", help="default benchmarks/results/fast.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/fast.png", help="default docs/fast.png")
    options = parser.parse_args()
    mpl.use("agg")
    draw(read_points(options.points), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
