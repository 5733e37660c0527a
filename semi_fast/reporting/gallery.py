"""Pictures: pseudo-labels the model is most and least sure of, what the bank holds, its most confident mistakes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from semi_fast.reporting.page import Gallery, Picture, Section
from semi_fast.reporting.probe import Predictions
from semi_fast.reporting.rundata import RunData, label

SHOWN = 24  # pictures of a gallery
BANK_CLASSES, BANK_EACH = 24, 12  # classes whose entries are shown, and how many of each
LARGEST = 96  # px: larger images are shown smaller


def gallery_section(run: RunData) -> Section:
    """All galleries, and why any of them is missing."""
    section = Section("gallery", "Pictures")
    if run.probe is None or run.arrays is None:
        reason = run.why.get("data") or run.why.get("model") or "the model was not run over the data."
        section.missing.append(f"No pictures: {reason}")
        return section
    _pseudo_labels(run, section)
    _bank(run, section)
    _mistakes(run, section)
    return section


def _pseudo_labels(run: RunData, section: Section) -> None:
    unlabeled = run.probe.unlabeled if run.probe else None
    if unlabeled is None or run.arrays is None:
        section.missing.append("No pseudo-labels: the data set has no unlabeled images.")
        return
    head = unlabeled.heads[0]
    ranked = np.argsort(-unlabeled.confidences[head], kind="stable")
    if not (unlabeled.labels >= 0).any():
        section.missing.append("Whether a pseudo-label is right is not marked: the true classes are unknown.")
    seen = f"among {len(unlabeled.rows):,} of {unlabeled.total:,} unlabeled images, by the {head} head as trained"
    for title, chosen in (("Surest", ranked[:SHOWN]), ("Least sure", ranked[::-1][:SHOWN])):
        pictures = _pictures(run, run.arrays.train, unlabeled, chosen, head)
        caption = f"The {len(pictures)} {title.lower()} {seen}."
        section.galleries.append(Gallery(f"{title} pseudo-labels", pictures, caption))


def _mistakes(run: RunData, section: Section) -> None:
    test = run.probe.test if run.probe else None
    if test is None or run.arrays is None or not (test.labels >= 0).any():
        section.missing.append("No mistakes: there are no test images with labels.")
        return
    head = test.heads[0]
    wrong = np.flatnonzero((test.classes[head] != test.labels) & (test.labels >= 0))
    ranked = wrong[np.argsort(-test.confidences[head][wrong], kind="stable")]
    caption = (
        f"{len(wrong):,} of {len(test.rows):,} test images are taken for another class; these with the most confidence."
    )
    pictures = _pictures(run, run.arrays.test, test, ranked[:SHOWN], head)
    section.galleries.append(Gallery("Most confident mistakes on the test set", pictures, caption))


def _bank(run: RunData, section: Section) -> None:
    if run.probe is None or run.probe.bank is None or run.arrays is None or run.info is None:
        return
    rows, confidences = run.probe.bank
    shown = bank_classes(run.order, BANK_CLASSES)
    what = "The images behind the stored embeddings of each class, surest first; wrong ones are marked."
    section.galleries.append(Gallery("What the memory bank holds", [], what))
    for k in shown:
        pictures = [_stored(run, k, *entry) for entry in entries(rows[k], confidences[k])[:BANK_EACH]]
        taken = rows[k][rows[k] >= 0]
        truth = run.arrays.train_labels[taken]
        right = f", {100 * np.mean(truth[truth >= 0] == k):.0f}% of them of this class" if (truth >= 0).any() else ""
        caption = f"{len(taken)} of {rows.shape[1]} slots taken{right}."
        section.galleries.append(Gallery(label(run.info.class_names[k], 40), pictures, caption, small=True))
    if len(shown) < len(rows):
        section.missing.append(f"The bank holds {len(rows)} classes; {len(shown)} of them are shown, evenly by size.")


def entries(rows: NDArray[np.int64], confidences: NDArray[np.float32]) -> list[tuple[int, float, int]]:
    """The images behind a class's stored embeddings, (S,) each: (row, highest confidence, times stored), surest first.

    An image may be stored often: each of its strong views has an embedding of its own.
    """
    best: dict[int, tuple[float, int]] = {}
    for row, confidence in zip(rows.tolist(), confidences.tolist(), strict=True):
        if row >= 0:
            highest, times = best.get(row, (0.0, 0))
            best[row] = max(highest, confidence), times + 1
    return sorted(((row, c, n) for row, (c, n) in best.items()), key=lambda entry: (-entry[1], entry[0]))


def _stored(run: RunData, k: int, row: int, confidence: float, times: int) -> Picture:
    assert run.arrays is not None
    true = int(run.arrays.train_labels[row])
    lines = [f"stored confidence {confidence:.3f}", f"{times} of its views" if times > 1 else "1 of its views"]
    lines.append(f"is {run.class_names[true]}" if true >= 0 else "true class unknown")
    return Picture(picture(run.arrays.train[row]), lines, None if true < 0 else true == k)


def bank_classes(order: Sequence[int], most: int) -> list[int]:
    """At most `most` classes, evenly spaced in the order, its first and its last among them."""
    if len(order) <= most:
        return list(order)
    return [order[round(i * (len(order) - 1) / (most - 1))] for i in range(most)]


def _pictures(
    run: RunData, images: NDArray[np.uint8], seen: Predictions, chosen: NDArray[np.int64], head: str
) -> list[Picture]:
    names = run.class_names
    shown = []
    for i in chosen:
        true, predicted = int(seen.labels[i]), int(seen.classes[head][i])
        lines = [f"{names[predicted]} {100 * seen.confidences[head][i]:.0f}%"]
        if true >= 0 and true != predicted:
            lines.append(f"is {names[true]}")
        good = None if true < 0 else true == predicted
        shown.append(Picture(picture(images[seen.rows[i]]), lines, good))
    return shown


def picture(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) uint8 as a data URI: PNG where it is small, else JPEG of at most LARGEST px a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    data = io.BytesIO()
    if max(image.size) <= 32:
        image.save(data, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST, LARGEST))
        image.save(data, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
