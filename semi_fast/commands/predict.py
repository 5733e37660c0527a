"""Images classified by a trained model: of any size, mode and container, read as those of its data set were."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import replacing
from pipelines.reading import ImageFile, UnreadableError, find_images, normalized
from semi_fast.run.saved import Step, Trained, Weights, load_trained

TOP = 5  # classes that are listed for each image


class Prediction(NamedTuple):
    """What a model says of an image: the likeliest classes with their probabilities in [0, 1], likeliest first."""

    image: str
    top: list[tuple[str, float]]


class Unreadable(NamedTuple):
    """An image that could not be read, and why."""

    image: str
    reason: str


def predict(
    run: Path, images: Sequence[Path], out: Path | None, *, weights: Weights | None, step: Step, batch: int
) -> int:
    """Classify images and write the predictions; returns 1 when an image could not be read, else 0.

    Args:
        run: the run's folder. weights, step: see `load_trained`.
        images: files, folders and archives. out: a .csv or .json file; None: CSV on stdout.
        batch: images at a time.
    """
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out must end in .csv or .json, got {out}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(run, weights=weights, step=step, device=device)
    files = find_images(images)
    start = time.perf_counter()
    results = list(classify(trained, files, batch))
    seconds = time.perf_counter() - start
    good = [r for r in results if isinstance(r, Prediction)]
    bad = [r for r in results if isinstance(r, Unreadable)]
    _write(out, as_json(trained, good, bad) if out and out.suffix.lower() == ".json" else as_csv(good))
    model = f"{trained.settings.method.name}, step {trained.step:,}, {trained.weights} weights, {device}"
    rate = len(good) / max(seconds, 1e-9)
    print(f"{len(good):,} images in {seconds:.1f} s: {rate:,.0f} images/s ({model})", file=sys.stderr)
    for item in bad:
        print(f"unreadable: {item.image}: {item.reason}", file=sys.stderr)
    return 1 if bad else 0


def classify(trained: Trained, files: Sequence[ImageFile], batch: int) -> Iterator[Prediction | Unreadable]:
    """Predictions of the reported head for images, in their order; what cannot be read comes as Unreadable."""
    for start in range(0, len(files), batch):
        pixels: list[NDArray[np.uint8]] = []
        reasons: list[str | None] = []
        for file in files[start : start + batch]:
            try:
                pixels.append(file.pixels(trained.facts.info.resolution, trained.facts.resize_filter))
                reasons.append(None)
            except UnreadableError as error:
                reasons.append(str(error))
        tops = iter(top_classes(trained, np.stack(pixels)) if pixels else [])
        for file, reason in zip(files[start : start + batch], reasons, strict=True):
            yield Prediction(file.name, next(tops)) if reason is None else Unreadable(file.name, reason)


def top_classes(trained: Trained, images: NDArray[np.uint8]) -> list[list[tuple[str, float]]]:
    """The likeliest classes of images (n, H, W, 3) uint8 of the run's size: (name, probability)."""
    info = trained.facts.info
    device = next(trained.method.parameters()).device
    logits = trained.logits(normalized(images, info, device))[trained.method.reported]
    best = logits.softmax(1).topk(min(TOP, info.num_classes))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(info.class_names[k], p) for k, p in zip(classes, shares, strict=True)] for classes, shares in rows]


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A line an image: image, class, confidence, then the classes and confidences from the second on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    most = max((len(p.top) for p in predictions), default=1)
    more = [f"{name}{rank}" for rank in range(2, most + 1) for name in ("class", "confidence")]
    writer.writerow(["image", "class", "confidence", *more])
    for p in predictions:
        writer.writerow([p.image, *(cell for name, share in p.top for cell in (name, f"{share:.6f}"))])
    return text.getvalue()


def as_json(trained: Trained, predictions: Sequence[Prediction], bad: Sequence[Unreadable]) -> str:
    """All predictions, what could not be read, and which model they are of."""
    model = {
        "data": trained.facts.info.name,
        "method": trained.settings.method.name,
        "step": trained.step,
        "head": trained.method.reported,
        "weights": trained.weights,
    }
    images = [
        {
            "image": p.image,
            "class": p.top[0][0],
            "confidence": p.top[0][1],
            "top": [{"class": name, "confidence": share} for name, share in p.top],
        }
        for p in predictions
    ]
    unreadable = [item._asdict() for item in bad]
    return json.dumps({"model": model, "predictions": images, "unreadable": unreadable}, indent=1) + "\n"


def _write(out: Path | None, text: str) -> None:
    if out is None:
        print(text, end="")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.") from None
