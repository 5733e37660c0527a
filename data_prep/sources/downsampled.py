"""Downsampled ImageNet (16, 32, 64 px): batches of `data` (n, 3*S*S) uint8 and `labels` 1..1000, .npz or pickled."""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.sources.downloads import keeping
from data_prep.sources.images import Images, JoinedImages
from data_prep.sources.records import RecordImages
from data_prep.sources.unpickling import load_plain

BATCH = re.compile(r"(train_data_batch_(\d+)|val_data)(\.npz)?")


class Batches(NamedTuple):
    """Batch files in order."""

    train: list[Path]
    val: list[Path]


def find_batches(root: Path) -> Batches | None:
    """The batch files in `root` or one level below it; None when there is no training batch."""
    if not root.is_dir():
        return None
    batches: dict[str, Path] = {}
    for path in sorted(p for pattern in ("*", "*/*") for p in root.glob(pattern)):
        match = BATCH.fullmatch(path.name)
        if match and path.is_file():
            batches.setdefault(match[1], path)
    train = sorted((name for name in batches if name != "val_data"), key=lambda name: int(name.rpartition("_")[2]))
    if not train:
        return None
    return Batches([batches[name] for name in train], [batches["val_data"]] if "val_data" in batches else [])


def open_batches(batches: Batches, order: Sequence[int], cache: Path) -> tuple[dict[str, Images], int]:
    """The batches as collections, by split ("test" only where there is a val batch), and their images' side in pixels.

    Uncompressed .npz are read where they lie. Compressed and pickled ones are unpacked once, a batch at a time, into
    `cache`.

    Args:
        order: the class (0..999) of each of the set's own labels 1..1000.
    """
    splits: dict[str, Images] = {}
    sides: dict[int, Path] = {}
    for split, paths in (("train", batches.train), ("test", batches.val)):
        if paths:
            parts = [_open(path, np.asarray(order), cache) for path in paths]
            sides |= {part.side: path for part, path in zip(parts, paths, strict=True)}
            splits[split] = JoinedImages(parts)
    if len(sides) > 1:
        listed = ", ".join(f"{path.name} has {side} px" for side, path in sides.items())
        raise UserError(f"{paths[0].parent} mixes batches of different image sizes ({listed}). Keep those of one size.")
    return splits, next(iter(sides))


def _open(path: Path, order: NDArray[np.int64], cache: Path) -> RecordImages:
    data, offset, shape, labels = _open_npz(path, cache) if path.suffix == ".npz" else _open_pickle(path, cache)
    side = round((shape[1] / 3) ** 0.5) if len(shape) == 2 else 0
    if side < 1 or 3 * side * side != shape[1]:
        raise UserError(f"{path} has data of shape {shape}, not (n, 3*S*S). Take the official batches.")
    if labels.shape != (shape[0],) or labels.min(initial=1) < 1 or labels.max(initial=1) > len(order):
        raise UserError(f"{path} does not give a label 1..{len(order)} to each image. Take the official batches.")
    return RecordImages(data, order[labels - 1], side, f"{path.name} image", offset=offset)


def _open_npz(path: Path, cache: Path) -> tuple[Path, int, tuple[int, ...], NDArray[np.int64]]:
    """The file and byte at which the pixels begin, their shape, and the labels."""
    try:
        with np.load(path, allow_pickle=False) as content:
            labels = np.asarray(content["labels"]).astype(np.int64)
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("data.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                return (*_header(_unpack(path, archive, cache), 0, path), labels)
        return (*_header(path, _member_start(path, info.header_offset), path), labels)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is no batch of downsampled ImageNet ({type(error).__name__}: {error}).") from None


def _member_start(path: Path, header_offset: int) -> int:
    with open(path, "rb") as file:
        file.seek(header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return header_offset + 30 + int(name_length) + int(extra_length)


def _header(file_path: Path, start: int, path: Path) -> tuple[Path, int, tuple[int, ...]]:
    """Where the pixels of the .npy that begins at byte `start` lie."""
    with open(file_path, "rb") as file:
        file.seek(start)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype != np.uint8:
            raise UserError(
                f"{path} has data of {dtype}{', column by column' if fortran else ''}; expected bytes by row."
            )
        return file_path, file.tell(), shape


def _unpack(path: Path, archive: zipfile.ZipFile, cache: Path) -> Path:
    target = _unpacked_name(path, cache)
    if not target.exists():
        with archive.open("data.npy") as source, keeping(cache), replacing(target) as file:
            while block := source.read(1 << 22):
                file.write(block)
    return target


def _open_pickle(path: Path, cache: Path) -> tuple[Path, int, tuple[int, ...], NDArray[np.int64]]:
    target = _unpacked_name(path, cache)
    labels = target.with_suffix(".labels.npy")
    if not (target.exists() and labels.exists()):
        batch = load_plain(path.read_bytes(), str(path))
        data = batch.get("data")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or "labels" not in batch:
            raise UserError(f"{path} has no 'data' of bytes with 'labels'. Take the official batches.")
        for target_path, array in ((labels, np.array(batch["labels"], np.int64)), (target, np.ascontiguousarray(data))):
            with keeping(cache), replacing(target_path) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return (*_header(target, 0, path), np.load(labels))


def _unpacked_name(path: Path, cache: Path) -> Path:
    status = path.stat()
    key = hashlib.sha256(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache / "unpacked"
    with keeping(cache):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{path.stem}-{key}.npy"
