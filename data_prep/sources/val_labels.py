"""The classes of ILSVRC2012's flat validation images: from the devkit, or from a mapping file."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError

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


def find_val_labels(root: Path, given: Path | None) -> dict[str, str]:
    """Image name without suffix -> wnid, from the `given` file, or from one of the KNOWN below `root`.

    A mapping file has a line for each image with its name and its wnid ("ILSVRC2012_val_00000001.JPEG n01751748", or
    CSV), or just the wnids, in the order of the images' numbers.

    Raises: UserError when there is no such file, or it is not understood.
    """
    if given is not None:
        if not given.is_file():
            raise UserError(f"No such file: {given} (--val-labels).")
        return _read(given)
    for path in _candidates(root):
        return _read(path)
    raise UserError(f"{root} has a flat val/ and no labels for it. {REMEDY}")


def _candidates(root: Path) -> Iterator[Path]:
    folders = [root, *(f for f in sorted(root.glob("*")) if f.is_dir() and f.name not in ("train", "val"))]
    folders += [f / "data" for f in folders]
    for name in KNOWN:
        yield from (folder / name for folder in folders if (folder / name).is_file())


def _read(path: Path) -> dict[str, str]:
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_devkit(*_unpacked(path), where=str(path))
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.fullmatch(r"\s*(\d{1,4}\s+)*\d{1,4}\s*", text):
        meta = path.with_name(META)
        if not meta.is_file():
            raise UserError(f"{path} gives class numbers, for which {META} is needed beside it. {REMEDY}")
        return _from_devkit(text, meta.read_bytes(), where=str(meta))
    return _from_mapping(text, path)


def _from_mapping(text: str, path: Path) -> dict[str, str]:
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
            raise UserError(f"{path} is no mapping of images to wnids: '{line[:60]}' is not one of each. {REMEDY}")
    if bool(named) == bool(alone):
        mixed = "some lines name an image and some do not" if named else "no line with a wnid such as n01751748"
        raise UserError(f"{path} is no mapping of images to wnids ({mixed}). {REMEDY}")
    return named or {f"ILSVRC2012_val_{number:08d}": wnid for number, wnid in enumerate(alone, 1)}


def _unpacked(path: Path) -> tuple[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if name in (TRUTH, META) else None
                if file is not None:
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is a damaged archive ({error}). Download it again.") from None
    if len(contents) < 2:
        raise UserError(f"{path} lacks {TRUTH} or {META}: it is not the development kit of ILSVRC2012.")
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
