"""The README's table of ratios, made from benchmarks/results: `python -m benchmarks.tables` writes it anew.

It stands between `<!-- ratios -->` and `<!-- end of ratios -->`, a column a processor.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.common import RESULTS, ROOT
from data_prep.files import replacing

PAGE = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- ratios -->\n).*?(<!-- end of ratios -->)", re.DOTALL)
BUSY = 1.5  # a case's median round took so many times its fastest: that one may have been disturbed, too
# Benchmark and ratio -> what is compared, as it is shown.
ROWS = {
    ("augment", "views"): "one weak and two strong views of 32 px, one thread: x Pillow",
    ("loaders", "resident 32"): "batches of such views, `resident`: x a DataLoader with Pillow",
    ("loaders", "ffcv 32"): "the same, `ffcv`",
    ("loaders", "dali 32"): "the same, `dali`",
    ("memory_bank", "100 x 128 x 128"): "128 candidates into a memory bank of 100 classes, d = 128: x a loop",
    ("memory_bank", "127 x 512 x 2048"): "512 candidates into one of 127 classes, d = 2,048: x a loop",
    ("step", "efficiency"): "a SeMi step of WRN-28-2: share of the bare model's speed",
    ("step", "speedup"): "the same: x eager float32",
    ("step", "of peak"): "its operations a second: share of a large matrix product's",
    ("refresh", "100000 x 10"): "a refinement of DARP's table, 100,000 x 10: x a host loop",
    ("methods", "most over passes"): "the dearest method's step over its images through the network, FixMatch's = 1",
    ("build", "loops"): "building from 4,000 photographs: x bare Pillow loops",
}


def processor(hardware: dict[str, Any]) -> str:
    """The processor by its model and the best of its instructions."""
    return " ".join([hardware["cpu"], *hardware["instructions"][-1:]])


def table(results: list[dict[str, Any]]) -> str:
    """A row a ratio, a column a processor, and where each was measured."""
    lines = [
        f"| benchmark | what is compared | {' | '.join(processor(result['hardware']) for result in results)} |",
        "|---|---|" + "---:|" * len(results),
    ]
    found = [{line["benchmark"]: line for line in result["lines"]} for result in results]
    for (name, ratio), words in ROWS.items():
        cells = [shown(line[name], ratio) if name in line else "" for line in found]
        if any(cells):
            lines.append(f"| `{name}` | {words} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *map(source, results)])


def shown(line: dict[str, Any], name: str) -> str:
    """A ratio, or the least and the largest of several runs, with three digits; with ~ of a machine that was BUSY."""
    ratio = line["ratios"].get(name, [])
    busy = any(case["median"] > BUSY * case["min"] for case in line.get("cases", {}).values())
    text = " to ".join(f"{one:.3g}" for one in (ratio if isinstance(ratio, list) else [ratio]))
    return f"~{text}" if busy and text else text


def source(result: dict[str, Any]) -> str:
    """Where figures were measured: hardware, versions, commit."""
    hardware = result["hardware"]
    versions = ", ".join(f"{name} {hardware[name]}" for name in ("torch", "pillow", "ffcv", "dali") if name in hardware)
    where = f"{processor(hardware)}: {hardware['threads']} cores, {versions}, commit {result['commit']}"
    return f"{where}{'; ' + result['note'] if 'note' in result else ''}."


def rendered(text: str) -> str:
    """The PAGE with the table that the results of processors give."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    made = table([result for result in results if "lines" in result])  # those of cards have no lines
    return BLOCK.sub(lambda match: match[1] + made + "\n" + match[2], text)


def main() -> None:
    """Rewrite the PAGE's table."""
    text = rendered(PAGE.read_text())
    with replacing(PAGE) as file:
        file.write(text.encode())


if __name__ == "__main__":
    main()
