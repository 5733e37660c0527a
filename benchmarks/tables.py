"""The tables of docs/performance.md, made from benchmarks/results: `python -m benchmarks.tables` writes them anew.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is that of its result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS, ROOT
from data_prep.files import replacing

PAGE = ROOT / "docs/performance.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NAMES = {
    "resident": "`resident`",
    "ffcv": "`ffcv`",
    "ffcv:jpeg90": "`ffcv` of JPEGs",
    "dali": "`dali`",
    "dataloader": "DataLoader with Pillow",
    "ffcv_read": "FFCV alone, reading without views",
}


def loaders(result: dict[str, Any]) -> str:
    """Samples a second and the ratio to the DataLoader, a column a size."""
    cases = {(case["backend"], case["res"]): case for case in result["cases"]}
    sides = sorted({side for _, side in cases})
    lines = [
        "| back end | " + " | ".join(f"samples/s at {side} px | x DataLoader" for side in sides) + " |",
        "|---|" + "---|---|" * len(sides),
    ]
    for name, shown in NAMES.items():
        row = [cases.get((name, side)) for side in sides]
        cells = [f"{c['samples_per_s']:,} | {c['ratio_dataloader']:.1f}" if c else "- | -" for c in row]
        if any(row):
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(result)])


def source(result: dict[str, Any]) -> str:
    """Where figures were measured: hardware, versions, commit."""
    hardware = result["hardware"]
    versions = ", ".join(f"{name} {hardware[name]}" for name in ("torch", "ffcv", "dali") if hardware.get(name))
    device = hardware["gpu"] or f"{result['cores']} cores, {hardware['cpu']} ({hardware['capability']})"
    return f"Measured on {device}; {versions}; commit {result['commit']}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"loaders": loaders}


def rendered(text: str) -> str:
    """The PAGE with every table as its result says. Raises: KeyError or OSError for a table without a result."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        return match[1] + TABLES[name](json.loads((RESULTS / f"{name}.json").read_text())) + "\n" + match[3]

    return BLOCK.sub(replace, text)


def main() -> None:
    """Rewrite the PAGE's tables."""
    text = rendered(PAGE.read_text())
    with replacing(PAGE) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
