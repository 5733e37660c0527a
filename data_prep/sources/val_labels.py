"""The classes of ILSVRC2012's flat validation images: from the devkit, or from a mapping file."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.containers import FIELDS, Members
from data_prep.sources.resize import UnreadableError

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
# In the order in which they are looked for. The last ones are names under which people keep mapping files.
KNOWN = (
    TRUTH,
    "ILSVRC2012_devkit_t12.tar.gz",
    "LOC_val_solution.csv",
    "val_labels.txt",
    "val_labels.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
)
WNID = re.compile(r"\bn\d{8}\b")
# An image's name without its suffix: any name with one, or the official name without.
IMAGE = re.compile(r"(.+(?=\.(?:jpe?g|png)$)|ILSVRC2012_val_\d+)(?:\.\w+)?", re.IGNORECASE)
SEPARATORS = re.compile(r"[\s,;:=/\\\"'\[\]{}()]+")
REMEDY = (
    f"Put ILSVRC2012_devkit_t12.tar.gz or {TRUTH} with {META} beside val/, or give a mapping file with --val-labels."
)


def find_val_labels(root: Path, given: Path | None, others: Members) -> dict[str, str]:
    """Image name without suffix -> wnid, from the `given` file, or from one of the KNOWN in or beside `root`.

    A mapping file has a line for each image with its name and its wnid ("ILSVRC2012_val_00000001.JPEG n01751748", or
    CSV), or just the wnids, in the order of the images' numbers.

    Args:
        root: the folder or archive with the images.
        others: its files that are no images.

    Raises: UserError when there is no such file, or it is not understood.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"No such file: {given} (--val-labels).")
        return _read(_files(given.parent, [given, given.with_name(META)]), given.name)
    for files in (others, _beside(root)):
        names = sorted(files.names, key=lambda name: (name.count("/"), name))
        for known in KNOWN:
            found = next((name for name in names if name.rpartition("/")[2] == known), None)
            if found is not None:
                return _read(files, found)
    raise UserError(f"{root} has a flat val/ and no labels for it. {REMEDY}")


def _files(folder: Path, paths: Iterable[Path]) -> Members:
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return Members(folder, names, np.zeros(len(names), FIELDS))


def _beside(root: Path) -> Members:
    """The KNOWN files beside an archive, there or in a folder right below, or in that one's data/; none of a folder."""
    if root.is_dir():
        return _files(root, [])
    below = [f for f in sorted(root.parent.glob("*")) if f.is_dir() and f.name not in ("train", "val")]
    folders = [root.parent, *below, *(folder / "data" for folder in (root.parent, *below))]
    return _files(root.parent, [folder / name for folder in folders for name in (*KNOWN, META)])


def _read(files: Members, name: str) -> dict[str, str]:
    where = f"{files.root}/{name}"
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_devkit(*_unpacked(_bytes(files, name), where), where=where)
    text = _bytes(files, name).decode("utf-8", "replace")
    if re.fullmatch(r"\s*(\d{1,4}\s+)*\d{1,4}\s*", text):
        meta = f"{name.rpartition('/')[0]}/{META}".lstrip("/")
        if meta not in files.names:
            raise UserError(f"{where} gives class numbers, for which {META} is needed beside it. {REMEDY}")
        return _from_devkit(text, _bytes(files, meta), where=f"{files.root}/{meta}")
    return _from_mapping(text, where)


def _bytes(files: Members, name: str) -> bytes:
    try:
        return files.read(files.names.index(name))
    except UnreadableError as error:
        raise UserError(f"Cannot read {files.root}/{name} ({error}). {REMEDY}") from None


def _from_mapping(text: str, where: str) -> dict[str, str]:
    """Each line names one image and one wnid, in either order; or every line is a wnid alone, by image number."""
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and not WNID.search(lines[0]):
        lines = lines[1:]  # a header
    named: dict[str, str] = {}
    alone: list[str] = []
    for line in lines:
        parts = [part for part in SEPARATORS.split(line) if part]
        wnids = {part for part in parts if WNID.fullmatch(part)}
        images = {match[1] for part in parts if (match := IMAGE.fullmatch(part)) and not WNID.fullmatch(part)}
        if len(wnids) == 1 and len(images) == 1:
            named[images.pop()] = wnids.pop()
        elif len(parts) == len(wnids) == 1:
            alone.append(wnids.pop())
        else:
            raise UserError(f"{where} is no mapping of images to wnids: '{line[:60]}' is not one of each. {REMEDY}")
    if bool(named) == bool(alone):
        mixed = "some lines name an image and some do not" if named else "no line with a wnid such as n01751748"
        raise UserError(f"{where} is no mapping of images to wnids ({mixed}). {REMEDY}")
    return named or {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(alone, 1)}


def _unpacked(data: bytes, where: str) -> tuple[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if name in (TRUTH, META) else None
                if file is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{where} is a damaged archive ({error}). Download it again.") from None
    if len(contents) < 2:
        raise UserError(f"{where} lacks {TRUTH} or {META}: it is not the development kit of ILSVRC2012.")
    return contents[TRUTH].decode("ascii", "replace"), contents[META]


def _from_devkit(truth: str, meta: bytes, where: str) -> dict[str, str]:
    """The truth's line i is the class number of image i; meta.mat says which wnid a number is."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return {f"ILSVRC2012_val_{i:08d}": wnids[int(number)] for i, number in enumerate(truth.split(), 1)}
    except (ValueError, TypeError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise UserError(
            f"{where} does not give the wnid of a class number ({type(error).__name__}: {error})."
        ) from None
