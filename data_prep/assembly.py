"""Making a data folder: open -> plan -> fill -> formats -> manifest, then one rename that makes it appear."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import write_betons
from data_prep.dali import SHARD_IMAGES, write_dali
from data_prep.errors import UserError
from data_prep.filling import Target, fill, target, usable_cores
from data_prep.images import Bad, Images
from data_prep.journal import Journal
from data_prep.manifest import MANIFEST_NAME, FileEntry, Manifest, file_entry, write_manifest
from data_prep.recipes import Plan, Recipe
from data_prep.sources import Source
from data_prep.writers import ImageRows, fsync_path, link_or_copy, pixel_statistics, replacing, write_array

PARTS = ("train", "test")
BAD_IMAGES = "bad_images.json"
SHOWN_BAD = 5


@dataclass(frozen=True)
class Order:
    """What the user wants: a recipe, and how to carry it out. `say` receives one-line remarks."""

    recipe: Recipe
    out: Path
    cache: Path
    command: str
    source: Path | None = None
    workers: int | None = None
    formats: Sequence[str] = ()
    shard_images: int = SHARD_IMAGES
    force: bool = False
    on_bad_image: str = "error"
    say: Callable[[str], None] = print
    progress: bool = True


def assemble(order: Order, work: Path) -> None:
    """Build the order's folder by way of `work`, the folder of the unfinished build, which goes away at the end.

    Raises: UserError; OSError when the disk is full.
    """
    recipe = order.recipe
    source = recipe.open(order.source, order.cache)
    for note in source.notes:
        order.say(f"note: {note}")
    images = recipe.images(source)
    _open_work(work, recipe, images)
    with Journal(work / "journal") as journal:
        plan, arrays, bad = _fill_all(order, source, images, work, journal)
    for note in plan.notes:
        order.say(f"warning: {note}")
    result = _open_result(work, plan, arrays, order.shard_images)
    for part in PARTS:
        link_or_copy(arrays[part].path, result / f"{part}.npy")
        write_array(result / f"{part}_labels.npy", plan.labels(part))
    write_array(result / "labeled_rows.npy", plan.labeled)
    write_array(result / "unlabeled_rows.npy", plan.unlabeled)
    if any(bad.values()):
        _write_bad(result, bad)
    write_formats(result, order.formats, order.shard_images)
    _finish(order, source, plan, bad, result)
    _put_in_place(result, order.out)
    shutil.rmtree(work)


def _open_result(work: Path, plan: Plan, arrays: dict[str, Target], shard_images: int) -> Path:
    """The folder in the making. One left by an interrupted call keeps its finished formats, if of these rows."""
    facts = [arrays[part].path.name for part in PARTS] + [plan.labeled.tolist(), plan.unlabeled.tolist(), shard_images]
    identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    result = work / f"result-{identity}"
    result.mkdir(exist_ok=True)
    for path in result.iterdir():
        if path.suffix != ".beton" and not (path.name.endswith("-dali") and path.is_dir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return result


def _open_work(work: Path, recipe: Recipe, images: dict[str, Images]) -> None:
    """Make the folder of the unfinished build; one left by another order is emptied."""
    facts = [recipe.options(), recipe.resolution, recipe.filter_name, [images[part].digest() for part in PARTS]]
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    note = work / "order"
    if not note.is_file() or note.read_text() != identity:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        note.write_text(identity)


def _fill_all(
    order: Order, source: Source, images: dict[str, Images], work: Path, journal: Journal
) -> tuple[Plan, dict[str, Target], dict[str, dict[int, Bad]]]:
    """Fill both arrays; where bad images are skipped, plan again without them until none is left."""
    workers = order.workers or usable_cores()
    bad = {
        part: {i: Bad(i, images[part].name(i), reason) for i, reason in source.unusable(part).items()} for part in PARTS
    }
    if any(bad.values()):
        _report_bad(order, bad, work)
    earlier: dict[str, list[Target]] = {part: [] for part in PARTS}
    while True:
        plan = order.recipe.plan(source, images, {part: set(bad[part]) for part in PARTS})
        for part in PARTS:
            if not len(plan.rows[part]):
                raise UserError(f"No readable image is left for the {part} set.")
        goals = {
            part: target(work, part, images[part], plan.rows[part], order.recipe.resolution, order.recipe.filter_name)
            for part in PARTS
        }
        found = 0
        for part, goal in goals.items():
            for item in _fill_shown(goal, journal, workers, earlier[part], order.progress):
                bad[part][int(goal.rows[item.position])] = item
                found += 1
            earlier[part].append(goal)
        if not found:
            return plan, goals, bad
        _report_bad(order, bad, work)


def _report_bad(order: Order, bad: dict[str, dict[int, Bad]], work: Path) -> None:
    """Raises UserError about bad images unless they are to be skipped."""
    if order.on_bad_image == "error":
        _write_bad(work, bad)
        raise UserError(_bad_message(bad, work))
    order.say(f"warning: left out {sum(map(len, bad.values())):,} unreadable images")


def _fill_shown(goal: Target, journal: Journal, workers: int, earlier: list[Target], progress: bool) -> list[Bad]:
    from tqdm import tqdm

    bad: list[Bad] = []
    others = [other for other in earlier if other.path != goal.path]
    part = goal.path.name.split("-")[0]
    with tqdm(total=len(goal.rows), unit=" images", desc=f"{part:>5}", disable=None if progress else True) as bar:
        for done, found in fill(goal, journal, workers, others):
            bar.update(done)
            bad += found
    return bad


def _bad_message(bad: dict[str, dict[int, Bad]], work: Path) -> str:
    found = [item for part in PARTS for item in bad[part].values()]
    listed = ", ".join(f"{item.name} ({item.reason})" for item in found[:SHOWN_BAD])
    more = f" and {len(found) - SHOWN_BAD:,} more" if len(found) > SHOWN_BAD else ""
    return (
        f"{len(found):,} images cannot be used: {listed}{more}; all are in {work / BAD_IMAGES}. Mend them, or leave "
        "them out with --on-bad-image skip."
    )


def _write_bad(folder: Path, bad: dict[str, dict[int, Bad]]) -> None:
    listed = {part: [{"name": b.name, "reason": b.reason} for _, b in sorted(bad[part].items())] for part in PARTS}
    with replacing(folder / BAD_IMAGES) as file:
        file.write(json.dumps(listed, indent=2).encode())  # ASCII: a file name may be no valid Unicode


def write_formats(folder: Path, formats: Sequence[str], shard_images: int) -> list[str]:
    """Write the arrays of a folder in further formats, beside them, where it lacks them. Returns those written."""
    written = []
    if "ffcv" in formats and not all((folder / f"{part}.beton").exists() for part in PARTS):
        write_betons(folder, PARTS)
        written.append("ffcv")
    if "dali" in formats:
        lacking = [part for part in PARTS if not (folder / f"{part}-dali").exists()]
        for part in lacking:
            write_dali(folder, part, shard_images)
        written += ["dali"] if lacking else []
    return written


def entries(folder: Path) -> dict[str, FileEntry]:
    """Entries of all files of a folder but the manifest, by relative name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name: file_entry(folder / name) for name in names if name != MANIFEST_NAME and not name.startswith(".")}


def make_durable(folder: Path) -> None:
    """Wait until every file and folder below `folder` is on the disk: a manifest may then vouch for them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            fsync_path(path)


def _finish(order: Order, source: Source, plan: Plan, bad: dict[str, dict[int, Bad]], result: Path) -> None:
    from data_prep.preview import write_preview

    labels = plan.labels("train")
    classes = len(source.class_names)
    labeled = _counts(labels[plan.labeled], classes)
    unlabeled = None if np.any(labels[plan.unlabeled] < 0) else _counts(labels[plan.unlabeled], classes)
    with ImageRows(result / "train.npy") as images:
        mean, std = pixel_statistics(images)
    name = order.recipe.folder_name()
    title = f"{name}   ·   {classes} classes   ·   {order.recipe.resolution}×{order.recipe.resolution}"
    write_preview(
        result / "preview.png",
        title,
        np.load(result / "train.npy", mmap_mode="r"),
        labels,
        source.class_names,
        labeled,
        unlabeled,
        len(plan.unlabeled),
    )
    skipped = {part: len(found) for part, found in bad.items() if found}
    make_durable(result)
    write_manifest(
        result,
        Manifest(
            name=name,
            resolution=order.recipe.resolution,
            class_names=list(source.class_names),
            labeled_counts=labeled,
            unlabeled_counts=unlabeled,
            test_counts=_counts(plan.labels("test"), classes),
            mean=mean,
            std=std,
            split={**order.recipe.options(), **({"skipped": skipped} if skipped else {})},
            source=source.description,
            command=order.command,
            files=entries(result),
        ),
    )


def _counts(labels: NDArray[np.int64], classes: int) -> list[int]:
    return [int(n) for n in np.bincount(labels[labels >= 0], minlength=classes)]


def _put_in_place(result: Path, out: Path) -> None:
    """Rename the finished folder to its name; one that stands there goes away just before."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(result, out)
    fsync_path(out.parent)
    shutil.rmtree(old, ignore_errors=True)
