"""Classify images: `python -m semi_fast predict runs/NAME IMAGES_OR_DIR [--out predictions.csv]`.

Images may be of any size and mode: they are read and resized as those of the run's data set were. Folders are searched
for images, zip and tar archives are read in place.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.sources.containers import FIELDS, Members, is_image_name, list_members, split_archive_path, under
from data_prep.sources.resize import UnreadableError, decode, strict_decoding, to_size
from semi_fast.commands.run_command import run_command
from semi_fast.run.inputs import normalized
from semi_fast.run.saved import STEP_HELP, Trained, load_trained, step_named, weights_named

TOP = 5  # classes that are listed for each image
app = typer.Typer(add_completion=False)


class Prediction(NamedTuple):
    """What a model says of an image: the likeliest classes with their probabilities in [0, 1], likeliest first."""

    image: str
    top: list[tuple[str, float]]


class Unreadable(NamedTuple):
    """An image that could not be read, and why."""

    image: str
    reason: str


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, zip or tar archives.")],
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .json file for all predictions. Default: CSV on stdout.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema: the averaged ones; raw.")] = "ema",
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
) -> None:
    """Class, confidence and the five likeliest classes of images. Unreadable files are listed; exit code 1."""
    if out is not None and out.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out must end in .csv or .json, got {out}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained(run, weights=weights_named(weights), step=step_named(step), device=device)
    found = find_images(images)
    start = time.perf_counter()
    results = list(classify(trained, found, batch))
    seconds = time.perf_counter() - start
    good = [r for r in results if isinstance(r, Prediction)]
    bad = [r for r in results if isinstance(r, Unreadable)]
    _write(out, as_json(trained, good, bad) if out and out.suffix.lower() == ".json" else as_csv(good))
    where = f"{trained.settings.method.name}, step {trained.step:,}, {weights} weights, {device}"
    print(
        f"{len(good):,} images in {seconds:.1f} s: {len(good) / max(seconds, 1e-9):,.0f} images/s ({where})",
        file=sys.stderr,
    )
    for item in bad:
        print(f"unreadable: {item.image}: {item.reason}", file=sys.stderr)
    if bad:
        raise typer.Exit(1)


def find_images(places: Sequence[Path]) -> list[tuple[Members, int]]:
    """The images at some places: files as they are, folders and archives searched; each as (collection, index).

    Raises: UserError for a place that is not there, or where no image is.
    """
    found: list[tuple[Members, int]] = []
    for place in places:
        if place.is_file() and is_image_name(place.name):
            members = Members(place.parent, [place.name], np.zeros(1, FIELDS))
            found.append((members, 0))
            continue
        root, inner = split_archive_path(place)
        members = under(list_members(root), inner)
        inside = [(members, i) for i, name in enumerate(members.names) if is_image_name(name)]
        if not inside:
            raise UserError(f"{place} has no images (.jpg, .png, .webp, ...).")
        found += inside
    return found


def classify(trained: Trained, images: Sequence[tuple[Members, int]], batch: int) -> Iterator[Prediction | Unreadable]:
    """Predictions of the reported head for images, in their order; what cannot be read comes as Unreadable."""
    info = trained.facts.info
    for start in range(0, len(images), batch):
        pixels: list[NDArray[np.uint8]] = []
        block: list[tuple[str, str]] = []  # name, and why it cannot be read
        for members, index in images[start : start + batch]:
            name = str(members.root / members.names[index])
            try:
                with strict_decoding():
                    pixels.append(to_size(decode(members.read(index)), info.resolution, trained.facts.resize_filter))
                block.append((name, ""))
            except UnreadableError as error:
                block.append((name, str(error)))
        tops = iter(top_classes(trained, np.stack(pixels)) if pixels else [])
        for name, reason in block:
            yield Unreadable(name, reason) if reason else Prediction(name, next(tops))


@torch.no_grad()
def top_classes(trained: Trained, images: NDArray[np.uint8]) -> list[list[tuple[str, float]]]:
    """The likeliest classes of images (n, H, W, 3) uint8 of the run's size: (name, probability)."""
    info = trained.facts.info
    device = next(trained.method.parameters()).device
    best = trained.method.predict(normalized(images, info, device)).softmax(1).topk(min(TOP, info.num_classes))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(info.class_names[k], p) for k, p in zip(classes, shares, strict=True)] for classes, shares in rows]


def as_csv(predictions: Sequence[Prediction]) -> str:
    """A line an image: image, class, confidence, then the classes and confidences from the second on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    places = max((len(p.top) for p in predictions), default=1)
    header = ["image", "class", "confidence"]
    for place in range(2, places + 1):
        header += [f"class{place}", f"confidence{place}"]
    writer.writerow(header)
    for p in predictions:
        writer.writerow([p.image, *(cell for name, share in p.top for cell in (name, f"{share:.6f}"))])
    return text.getvalue()


def as_json(trained: Trained, predictions: Sequence[Prediction], bad: Sequence[Unreadable]) -> str:
    """All predictions, what could not be read, and which model they are of."""
    model: dict[str, Any] = {
        "data": trained.facts.info.name,
        "method": trained.settings.method.name,
        "step": trained.step,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 when an image could not be read, 2 for a user's mistake."""
    return run_command(app, argv)


if __name__ == "__main__":
    sys.exit(main())
