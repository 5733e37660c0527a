"""Images classified by a trained model: of any size, mode and container, read as those of its data set were."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from pipelines.reading import ImageFile, UnreadableError, find_images, normalized
from semi_fast.run.log import write_file
from semi_fast.run.saved import Step, Trained, Weights, load_trained

TOP = 5  # classes that are listed for each image
Result = dict[str, Any]  # of an image: its name, and class, confidence and top, or the reason why there are none


def predict(
    run: Path, images: Sequence[Path], out: Path | None, *, weights: Weights | None, step: Step, batch: int
) -> int:
    """The command; returns 1 when an image could not be read, else 0. weights, step: see `load_trained`."""
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out must end in .csv or .json, got {out}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(run, weights=weights, step=step, device=device)
    files = find_images(images)
    start = time.perf_counter()
    results = list(classify(trained, files, batch))
    seconds = time.perf_counter() - start
    good = [result for result in results if "class" in result]
    bad = [result for result in results if "reason" in result]
    text = as_json(trained, good, bad) if out and out.suffix.lower() == ".json" else as_csv(good)
    if out is None:
        print(text, end="")
    else:
        write_file(out, text.encode("utf-8", "surrogateescape"))
    model = f"{trained.settings.method.name}, step {trained.step:,}, {trained.weights} weights, {device}"
    rate = len(good) / max(seconds, 1e-9)
    print(f"{len(good):,} images in {seconds:.1f} s: {rate:,.0f} images/s ({model})", file=sys.stderr)
    for item in bad:
        print(f"unreadable: {item['image']}: {item['reason']}", file=sys.stderr)
    return 1 if bad else 0


def classify(trained: Trained, files: Sequence[ImageFile], batch: int) -> Iterator[Result]:
    """What the reported head says of images, in their order, as --out gives it; of one that cannot be read, why."""
    info, device = trained.facts.info, next(trained.method.parameters()).device
    for start in range(0, len(files), batch):
        pixels: list[NDArray[np.uint8]] = []
        results: list[Result] = [{"image": file.name} for file in files[start : start + batch]]
        for file, result in zip(files[start : start + batch], results, strict=True):
            try:
                pixels.append(file.pixels(trained.facts.preparation))
            except UnreadableError as error:
                result["reason"] = str(error)
        if pixels:
            logits = trained.logits(normalized(np.stack(pixels), info, device))[trained.method.reported]
            best = logits.softmax(1).topk(min(TOP, info.num_classes))
            good = (result for result in results if "reason" not in result)
            for result, classes, shares in zip(good, best.indices.tolist(), best.values.tolist(), strict=True):
                names = [info.class_names[k] for k in classes]
                top = [{"class": name, "confidence": share} for name, share in zip(names, shares, strict=True)]
                result |= {**top[0], "top": top}
        yield from results


def as_csv(predictions: Sequence[Result]) -> str:
    """A line an image: image, class, confidence, then the classes and confidences from the second on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    most = max((len(p["top"]) for p in predictions), default=1)
    more = [f"{name}{rank}" for rank in range(2, most + 1) for name in ("class", "confidence")]
    writer.writerow(["image", "class", "confidence", *more])
    for p in predictions:
        pairs = ((one["class"], f"{one['confidence']:.6f}") for one in p["top"])
        writer.writerow([p["image"], *itertools.chain.from_iterable(pairs)])
    return text.getvalue()


def as_json(trained: Trained, predictions: Sequence[Result], bad: Sequence[Result]) -> str:
    """All predictions, what could not be read, and which model they are of."""
    model = {
        "data": trained.facts.info.name,
        "method": trained.settings.method.name,
        "step": trained.step,
        "head": trained.method.reported,
        "weights": trained.weights,
    }
    return json.dumps({"model": model, "predictions": predictions, "unreadable": bad}, indent=1) + "\n"
