"""What to label next: to_label.csv beside a report, the images of the least sure pseudo-labels of each class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.files import replacing
from pipelines.reading import row_names
from semi_fast.reporting.page import Section, Table
from semi_fast.reporting.rundata import Predictions, RunData

TO_LABEL, EACH = "to_label.csv", 10  # the file, and images a class where the user says nothing else
SHOWN = 20  # classes in the report's table


def least_sure(classes: NDArray[np.int64], confidences: NDArray[np.float32], each: int) -> NDArray[np.int64]:
    """Of each predicted class the images of the lowest confidence, at most `each`: positions, class by class, the least
    sure first, the earlier of equals. classes, confidences: (n,)."""
    order = np.lexsort((np.arange(len(classes)), confidences, classes))
    starts = np.searchsorted(classes[order], classes[order])  # where the class of each begins
    return order[np.arange(len(order)) - starts < each]


def to_label_section(run: RunData, folder: Path, each: int) -> Section:
    """Write to_label.csv into `folder`, and say in the report what it holds.

    Its columns are path ("" where the data folder does not know it), label (empty, to be filled in), pseudo_label,
    confidence (of the reported head on the plain image) and row (of train.npy). Labeled images are not listed.
    A file there in which labels are filled in stays as it is. Raises: OSError when it cannot be written.
    """
    section = Section("to-label", "To label next")
    seen, arrays = run.unlabeled, run.arrays
    if seen is None or arrays is None:
        reason = run.why.get("data") or run.why.get("model") or "there are no unlabeled images."
        section.missing.append(f"No {TO_LABEL}: {reason}")
        return section
    if _is_edited(folder / TO_LABEL):
        section.missing.append(
            f"{folder / TO_LABEL} has labels filled in and is left as it is. "
            "For a new list, rename it and report again."
        )
        print(section.missing[0])
        return section
    head = seen.heads[0]
    asked = np.flatnonzero(~np.isin(seen.rows, arrays.labeled_rows))
    chosen = asked[least_sure(seen.classes[head][asked], seen.confidences[head][asked], each)]
    names = row_names(arrays.folder)
    with replacing(folder / TO_LABEL) as file:
        file.write(_as_csv(run, seen, chosen, names).encode("utf-8", "surrogateescape"))
    section.lead = (
        f"{TO_LABEL} lists {len(chosen):,} of {len(asked):,} unlabeled images looked at: at most {each:,} of each "
        f"class that the {head} head gives them, those it is least sure of. "
        + ("" if names else "The data set does not keep the images' paths: they are named by their row of train.npy.")
    )
    section.tables.append(_table(run, seen, chosen, asked))
    return section


def _is_edited(path: Path) -> bool:
    """Whether there is a to_label.csv in which not every label is empty, or that has another form than ours, as
    spreadsheets save one."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            return any(line.get("label") != "" for line in csv.DictReader(file))
    except FileNotFoundError:
        return False
    except csv.Error:
        return True


def _as_csv(run: RunData, seen: Predictions, chosen: NDArray[np.int64], names: Sequence[str] | None) -> str:
    text, head, info = io.StringIO(), seen.heads[0], run.info
    assert info is not None
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "pseudo_label", "confidence", "row"])
    for i in chosen.tolist():
        row, guess = int(seen.rows[i]), info.class_names[int(seen.classes[head][i])]
        writer.writerow([names[row] if names else "", "", guess, f"{seen.confidences[head][i]:.6f}", row])
    return text.getvalue()


def _table(run: RunData, seen: Predictions, chosen: NDArray[np.int64], asked: NDArray[np.int64]) -> Table:
    """How sure the pseudo-labels of each class are, the classes of the least sure ones first."""
    head, rows = seen.heads[0], []
    for k in range(len(run.class_names)):
        all_of, listed = (part[seen.classes[head][part] == k] for part in (asked, chosen))
        if len(listed):
            lowest, median = seen.confidences[head][listed].min(), np.median(seen.confidences[head][all_of])
            rows.append(
                (float(lowest), (run.class_names[k], len(all_of), len(listed), f"{lowest:.2f}", f"{median:.2f}"))
            )
    cells = [row for _, row in sorted(rows, key=lambda row: row[0])[:SHOWN]]
    header = ("pseudo-label", "images", "listed", "least sure", "median")
    more = f"The {SHOWN} classes of the least sure ones." if len(rows) > SHOWN else ""
    return Table(header, cells, numeric=[1, 2, 3, 4], title="Confidence of the pseudo-labels", caption=more)
