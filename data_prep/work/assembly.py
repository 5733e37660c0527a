"""Making a data folder: open -> plan -> fill -> formats -> manifest, then one rename that makes it appear."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.cores import usable_cores
from data_prep.errors import UserError
from data_prep.files import fsync_path, link_or_copy, remove, remove_folder
from data_prep.folder.dali import SHARD_IMAGES
from data_prep.folder.finished import Files, record_path
from data_prep.folder.formats import FORMS, PARTS, words, write_formats
from data_prep.folder.manifest import VALIDATION_ROWS, Manifest, Origin, class_counts, file_entry, write_manifest
from data_prep.folder.writers import ImageRows, pixel_statistics, write_array, write_names
from data_prep.progress import Bar
from data_prep.recipes.base import Plan
from data_prep.recipes.orders import Order, check_unread, command_to_keep
from data_prep.sources.images import BadImage, Images, Source
from data_prep.work.bad_images import report_bad, write_bad
from data_prep.work.filling import Target, fill, start_server, target
from data_prep.work.journal import Journal
from data_prep.work.margins import paint_margins
from data_prep.work.overlap import Digests, check_labels, check_overlap, pixel_digests, same_pixels
from data_prep.work.unfinished import open_work


def assemble(order: Order, work: Path) -> None:
    """Build the order's folder by way of `work`, the folder of the unfinished build, which goes away at the end.

    Raises: UserError; OSError when the disk is full.
    """
    recipe = order.recipe
    if order.inputs and (order.workers or usable_cores()) > 1:
        start_server()
    source = recipe.open(order.source, order.cache)
    for note in source.notes:
        order.say(f"note: {note}")
    images = recipe.images(source)
    check_unread(order, images)
    recipe.plan(source, images, {part: set(source.unusable.get(part, {})) for part in PARTS})  # errors before any work
    origin = order.origin(images)  # before they are read: what changes from now on counts as changed
    open_work(work, order, images)
    with Journal(work / "journal") as journal:
        plan, arrays, bad, color, digests = _fill_all(order, source, images, work, journal)
    marked = {part: journal.marked(goal.path.name) for part, goal in arrays.items()}
    remarks = {
        "skipped": {part: len(items) for part, items in bad.items() if items},
        "exif_rotated": {part: rotated for part, (rotated, _) in marked.items() if rotated},
        "enlarged": {part: enlarged for part, (_, enlarged) in marked.items() if enlarged},
        "copies_left_out": plan.copies,
        "test_overlap": check_overlap(order, plan, digests, work),
        "pad_color": color,
    }
    for note in [*plan.facts, *_in_words(remarks, recipe.resolution)]:
        order.say(f"note: {note}")
    for note in plan.notes:
        order.say(f"warning: {note}")
    result = _open_result(work, plan, arrays, journal, order)
    for part in PARTS:
        link_or_copy(arrays[part].path, result / f"{part}.npy")
        write_array(result / f"{part}_labels.npy", plan.labels(part))
    write_array(result / "labeled_rows.npy", plan.labeled)
    write_array(result / "unlabeled_rows.npy", plan.unlabeled)
    if plan.validation is not None:
        write_array(result / VALIDATION_ROWS, plan.validation)
    if recipe.chosen_test:
        for part in PARTS:
            write_names(result, part, [plan.images[part].name(row) for row in plan.rows[part].tolist()])
    if any(bad.values()):
        write_bad(result, bad)
    formats = write_formats(result, order.formats, order.shard_images or SHARD_IMAGES, result.name, order.beton)
    _finish(order, source, plan, {key: value for key, value in remarks.items() if value}, result, origin, formats)
    _put_in_place(result, order.out)
    remove_folder(work)


class Filled(NamedTuple):
    """Both arrays as they are to be: of which rows, which images could not be read (by part and index), the color
    of the margins, and what tells the rows' pixels apart."""

    plan: Plan
    arrays: dict[str, Target]
    bad: dict[str, dict[int, BadImage]]
    color: tuple[int, int, int] | None
    digests: Digests


def _in_words(remarks: dict[str, Any], resolution: int) -> list[str]:
    """What the user should know of the images that were read, in one sentence each."""
    small, copies = sum(remarks["enlarged"].values()), remarks["copies_left_out"]
    lines = [f"{small:,} images are smaller than {resolution} pixels and are enlarged"] if small else []
    held_out = f"{copies:,} images are copies of held-out images, the same at {resolution} pixels: they are left out"
    return lines + ([held_out] if copies else [])


def _open_result(work: Path, plan: Plan, arrays: dict[str, Target], journal: Journal, order: Order) -> Path:
    """The folder in the making. One left by an interrupted call keeps what there is of the formats asked for, if of
    these very rows."""
    rows = (plan.labeled, plan.unlabeled, *(() if plan.validation is None else (plan.validation,)))
    identity = hashlib.sha256(b"\0".join(part.tobytes() for part in rows))
    for part in PARTS:
        name = arrays[part].path.name
        chunks = sorted((chunk, done.crc) for chunk, done in journal.chunks[name].items())
        identity.update(json.dumps([name, chunks]).encode() + plan.labels(part).tobytes())
    result = work / f"result-{identity.hexdigest()[:12]}"
    result.mkdir(exist_ok=True)
    kept = {name for form in order.formats if form in FORMS for name in (*FORMS[form], record_path(result, form).name)}
    for path in result.iterdir():
        if path.name not in kept:
            remove(path)
    return result


def _fill_all(order: Order, source: Source, images: dict[str, Images], work: Path, journal: Journal) -> Filled:
    """Fill both arrays; where bad images are skipped, plan again without them until none is left. Which images have the
    same pixels is known then: where some have, and images are held out, they are drawn anew by that, once."""
    workers = order.workers or usable_cores()
    bad = {
        part: {i: BadImage(i, images[part].name(i), reason) for i, reason in source.unusable.get(part, {}).items()}
        for part in PARTS
    }
    if any(bad.values()):
        report_bad(order, bad, work)
    earlier: dict[str, list[Target]] = {part: [] for part in PARTS}
    same = None
    while True:
        plan = order.recipe.plan(source, images, {part: set(bad[part]) for part in PARTS}, same)
        for part in PARTS:
            if not len(plan.rows[part]):
                raise UserError(
                    f"No usable image is left for the {part} set: each is unreadable, or of a class without training "
                    "images."
                )
        goals = {part: target(work, part, images[part], plan.rows[part], order.recipe.preparation) for part in PARTS}
        newly_bad = 0
        for part, goal in goals.items():
            for item in _fill_shown(goal, journal, workers, earlier[part], order.progress):
                bad[part][int(goal.rows[item.position])] = item
                newly_bad += 1
            earlier[part].append(goal)
        if newly_bad:
            report_bad(order, bad, work)
            continue
        color = paint_margins(goals, journal)
        digests = {part: pixel_digests(goal.path) for part, goal in goals.items()}
        if order.recipe.chosen_test:
            check_labels(plan, digests, test=order.recipe.holds_out)
        if (order.recipe.draws or len(source.validation)) and same is None:
            same = same_pixels(plan, digests, test=order.recipe.holds_out)
            if len(np.unique(same)) < len(same):
                continue
        return Filled(plan, goals, bad, color, digests)


def _fill_shown(goal: Target, journal: Journal, workers: int, earlier: list[Target], progress: bool) -> list[BadImage]:
    bad: list[BadImage] = []
    others = [other for other in earlier if other.path != goal.path]
    part = goal.path.name.split("-")[0]
    with Bar(f"{part:>5}", "images", len(goal.rows), shown=progress) as bar:
        for done, unreadable in fill(goal, journal, workers, others):
            bar.update(done)
            bad += unreadable
    return bad


def make_durable(folder: Path) -> None:
    """Wait until every file and folder below `folder` is on the disk: a manifest may then vouch for them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            fsync_path(path)


def _finish(
    order: Order,
    source: Source,
    plan: Plan,
    remarks: dict[str, Any],
    result: Path,
    origin: Origin,
    formats: Files,
) -> None:
    from data_prep.folder.preview import write_preview

    labels = plan.labels("train")
    classes = len(plan.class_names)
    arrays = {"train_labels": labels, "labeled_rows": plan.labeled, "unlabeled_rows": plan.unlabeled}
    arrays |= {} if plan.validation is None else {"validation_rows": plan.validation}
    counts = class_counts({**arrays, "test_labels": plan.labels("test")}, classes)
    with ImageRows(result / "train.npy") as images:
        mean, std = pixel_statistics(images)
    name = order.recipe.folder_name()
    title = f"{name}   ·   {classes} classes   ·   {order.recipe.resolution}×{order.recipe.resolution}"
    write_preview(
        result / "preview.png",
        title,
        np.load(result / "train.npy", mmap_mode="r"),
        labels,
        plan.class_names,
        counts["labeled_counts"] or [],
        counts["unlabeled_counts"],
        len(plan.unlabeled),
    )
    make_durable(result)
    arrays_and_more = [path for path in result.iterdir() if path.is_file() and not path.name.startswith(".")]
    files = {**{path.name: file_entry(path) for path in arrays_and_more if path.name not in formats}, **formats}
    write_manifest(
        result,
        Manifest(
            name=name,
            resolution=order.recipe.resolution,
            class_names=list(plan.class_names),
            **counts,
            mean=mean,
            std=std,
            split={**order.recipe.options(), **remarks},
            source=source.description,
            command=command_to_keep(
                order.command, words([form for form in FORMS if form in order.formats], order.beton), None
            ),
            origin=origin,
            files=dict(sorted(files.items())),
        ),
    )
    for form in FORMS:  # what the manifest lists needs no record
        remove(record_path(result, form))


def _put_in_place(result: Path, out: Path) -> None:
    """Rename the finished folder to its name; one that stands there goes away just before."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(result, out)
    fsync_path(out.parent)
    shutil.rmtree(old, ignore_errors=True)
