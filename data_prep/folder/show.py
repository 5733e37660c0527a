"""What `build.py info` prints."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.folder.formats import words
from data_prep.folder.manifest import Manifest, read_manifest


def show_folder(folder: Path) -> None:
    """Print what a data folder holds. Raises UserError when it is none."""
    manifest = read_manifest(folder)
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for key, value in _facts(manifest):
        facts.add_row(key, Text(value))  # a Text: brackets in a name are no markup
    console.print(Text.assemble((manifest.name, "bold"), f" in {folder}\n"))
    console.print(facts)
    console.print()
    console.print(_class_table(manifest))


def _facts(m: Manifest) -> list[tuple[str, str]]:
    size = sum(entry.bytes for entry in m.files.values())
    unlabeled = m.files["unlabeled_rows.npy"].shape or [0]
    overlap = m.split.get("test_overlap", 0)
    remarks = ("dataset", "skipped", "test_overlap", "exif_rotated", "enlarged", "copies_left_out")
    split = ", ".join(f"{key} {value}" for key, value in m.split.items() if key not in remarks and value is not None)
    turned = m.split.get("exif") == "apply"
    rotated = "turned as EXIF asks" if turned else "stored as they are: EXIF's rotation is not applied"
    copies = m.split.get("copies_left_out", 0)
    facts = [
        ("classes", f"{len(m.class_names)}"),
        ("images", f"{m.resolution}×{m.resolution} RGB"),
        ("labeled", f"{sum(m.labeled_counts):,}   imbalance {_imbalance(m.labeled_counts)}"),
        ("unlabeled", f"{unlabeled[0]:,}   imbalance {_imbalance(m.unlabeled_counts)}"),
        ("test", f"{sum(m.test_counts):,}"),
        ("validation", "" if m.validation_counts is None else f"{sum(m.validation_counts):,}"),
        ("overlap", f"{overlap:,} test images are training images too" if overlap else ""),
        ("left out", _by_part(m.split.get("skipped", {}), "unreadable")),
        ("copies", f"{copies:,} of held-out images, left out of training" if copies else ""),
        ("rotated", _by_part(m.split.get("exif_rotated", {}), rotated)),
        ("enlarged", _by_part(m.split.get("enlarged", {}), f"smaller than {m.resolution} pixels")),
        ("mean, std", f"{_three(m.mean)}, {_three(m.std)}"),
        ("formats", ", ".join(["array", *words(m.formats, m.origin.beton)])),
        ("size", f"{size / 1e6:,.1f} MB in {len(m.files) + 1} files"),
        ("split", split),
        ("source", m.source),
        ("command", m.command),
        ("fingerprint", m.fingerprint[:16]),
    ]
    return [(key, value) for key, value in facts if value]


def _by_part(images: dict[str, int], what: str) -> str:
    """Numbers of images by part, "" where there are none."""
    return f"{', '.join(f'{n:,} {part}' for part, n in images.items())} images, {what}" if images else ""


def _imbalance(counts: list[int] | None) -> str:
    if counts is None:
        return "unknown (no labels)"
    if not min(counts):
        return f"{max(counts):,} : 0"
    return f"{max(counts) / min(counts):.4g} ({max(counts):,} : {min(counts):,})"


def _three(values: list[float]) -> str:
    return "(" + " ".join(f"{value:.4f}" for value in values) + ")"


def _class_table(m: Manifest) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("class", overflow="fold", max_width=22)
    more = {} if m.validation_counts is None else {"validation": m.validation_counts}
    for heading in ("labeled", "unlabeled", *more, "test"):
        table.add_column(heading, justify="right")
    table.add_column("")
    longest = max(m.labeled_counts)
    unlabeled: list[int] | list[None] = m.unlabeled_counts or [None] * len(m.class_names)
    held = [*more.values(), m.test_counts]
    for name, n, u, *others in zip(m.class_names, m.labeled_counts, unlabeled, *held, strict=True):
        bar = "█" * max(1, round(30 * n / longest)) if n else ""
        numbers = (f"{n:,}", "?" if u is None else f"{u:,}", *(f"{count:,}" for count in others))
        table.add_row(Text(name), *numbers, Text(bar, "red"))
    return table
