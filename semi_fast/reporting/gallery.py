"""Pictures: pseudo-labels the model is most and least sure of, what the bank holds, its most confident mistakes."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.arrays import Arrays
from semi_fast.reporting.page import Gallery, Picture, Section
from semi_fast.reporting.rundata import Predictions, RunData, label

SHOWN = 24  # pictures of a gallery, and classes of the bank
BANK_EACH = 12  # entries of a class that are shown
LARGEST = 96  # px: larger images are shown smaller


def gallery_section(run: RunData) -> Section:
    """All galleries, and why any of them is missing."""
    section = Section("gallery", "Pictures")
    if run.trained is None or run.arrays is None:
        reason = run.why.get("data") or run.why.get("model") or "the model was not run over the data."
        section.missing.append(f"No pictures: {reason}")
        return section
    _pseudo_labels(run, run.arrays, section)
    if run.bank is not None:
        _bank(run, run.arrays, *run.bank, section)
    _mistakes(run, run.arrays, section)
    return section


def _pseudo_labels(run: RunData, arrays: Arrays, section: Section) -> None:
    unlabeled = run.unlabeled
    if unlabeled is None:
        section.missing.append("No pseudo-labels: the data set has no unlabeled images.")
        return
    head = unlabeled.heads[0]
    ranked = np.argsort(-unlabeled.confidences[head], kind="stable")
    if not (unlabeled.labels >= 0).any():
        section.missing.append("Whether a pseudo-label is right is not marked: the true classes are unknown.")
    seen = f"among {len(unlabeled.rows):,} of {unlabeled.total:,} unlabeled images, by the {head} head as trained"
    for title, chosen in (("Surest", ranked[:SHOWN]), ("Least sure", ranked[::-1][:SHOWN])):
        pictures = _predicted(run, arrays.train, unlabeled, chosen)
        caption = f"The {len(pictures)} {title.lower()} {seen}."
        section.galleries.append(Gallery(f"{title} pseudo-labels", pictures, caption))


def _mistakes(run: RunData, arrays: Arrays, section: Section) -> None:
    test = run.test
    if test is None or not (test.labels >= 0).any():
        section.missing.append("No mistakes: there are no test images with labels.")
        return
    head = test.heads[0]
    wrong = np.flatnonzero((test.classes[head] != test.labels) & (test.labels >= 0))
    ranked = wrong[np.argsort(-test.confidences[head][wrong], kind="stable")]
    caption = (
        f"{len(wrong):,} of {len(test.rows):,} test images are taken for another class; these with the most confidence."
    )
    pictures = _predicted(run, arrays.test, test, ranked[:SHOWN])
    section.galleries.append(Gallery("Most confident mistakes on the test set", pictures, caption))


def _bank(
    run: RunData, arrays: Arrays, rows: NDArray[np.int64], confidences: NDArray[np.float32], section: Section
) -> None:
    what = "The images behind the stored embeddings of each class, surest first; wrong ones are marked."
    section.galleries.append(Gallery("What the memory bank holds", [], what))
    # Evenly spaced from the class with most labels to the one with fewest, those two among them.
    shown = [run.order[i] for i in dict.fromkeys(np.linspace(0, len(rows) - 1, SHOWN).round().astype(int).tolist())]
    for k in shown:
        taken = np.flatnonzero(rows[k] >= 0)
        ranked = taken[np.argsort(-confidences[k][taken], kind="stable")]
        # Each strong view of an image has an embedding of its own: shown is the surest.
        best = {int(rows[k][slot]): float(confidences[k][slot]) for slot in ranked[::-1]}
        entries = sorted(best.items(), key=lambda entry: -entry[1])[:BANK_EACH]
        pictures = [
            _picture(run, arrays.train[row], f"stored confidence {confidence:.3f}", k, int(arrays.train_labels[row]))
            for row, confidence in entries
        ]
        truth = arrays.train_labels[rows[k][taken]]
        right = f", {100 * np.mean(truth[truth >= 0] == k):.0f}% of them of this class" if (truth >= 0).any() else ""
        caption = f"{len(taken)} of {rows.shape[1]} slots taken{right}."
        section.galleries.append(Gallery(label(run.class_names[k], 40), pictures, caption, small=True))
    if len(shown) < len(rows):
        section.missing.append(f"The bank holds {len(rows)} classes; {len(shown)} of them are shown, evenly by size.")


def _predicted(run: RunData, images: NDArray[np.uint8], seen: Predictions, chosen: NDArray[np.int64]) -> list[Picture]:
    """Pictures of the chosen predictions of the first head."""
    head, pictures = seen.heads[0], []
    for i in chosen:
        guess = int(seen.classes[head][i])
        text = f"{run.class_names[guess]} {100 * seen.confidences[head][i]:.0f}%"
        pictures.append(_picture(run, images[seen.rows[i]], text, guess, int(seen.labels[i])))
    return pictures


def _picture(run: RunData, pixels: NDArray[np.uint8], text: str, guess: int, true: int) -> Picture:
    """A picture with a line of text and, where the guess is wrong or the true class unknown (-1), one about that."""
    known = f"is {run.class_names[true]}" if true >= 0 else "true class unknown"
    return Picture(picture(pixels), [text] if true == guess else [text, known], None if true < 0 else true == guess)


def picture(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) uint8 as a data URI: PNG where it is small, else JPEG of at most LARGEST px a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    data, kind = io.BytesIO(), "png" if max(image.size) <= 32 else "jpeg"
    image.thumbnail((LARGEST, LARGEST))
    image.save(data, kind, optimize=True, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
