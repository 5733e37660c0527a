"""Files in a folder, a zip or a tar, listed once and then read by any process without unpacking."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.resize import SUFFIXES, UnreadableError
from data_prep.sources.tars import NOWHERE, tar_files

# A file of its own, or where inside which kind of archive; or never read: a name that climbs out of its archive, and a
# link in a tar to what is no file of it.
PLAIN, TAR, ZIP_STORED, ZIP_DEFLATED, LEAVING, LINK = range(6)
FIELDS = np.dtype([("offset", "i8"), ("size", "i8"), ("crc", "u4"), ("kind", "u1")])
MAX_FILE_BYTES = 1 << 30


@dataclass
class Members:
    """Files by name. `root` is the folder, or the archive in which they lie; `where` (n,) says at which bytes.
    `inside`: the folder below `root`, "" for all of it, that was searched for them, None where a list named them.
    `folders`: of all that was listed, by relative names, those that may hold nothing.

    Small to pickle, so that a worker process gets just the files of its chunk and opens nothing else.
    """

    root: Path
    names: list[str]
    where: NDArray[np.void]
    inside: str | None = ""
    folders: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def stamps(self) -> NDArray[np.int64]:
        """What tells that contents changed: (n, 2) or (1, 2) int64.

        In a zip, each file's packed size and CRC-32, which stay when the zip is moved, touched or copied; else size and
        time of change (ns) of the tar, or of each file of a folder, -1 for one that is not there.
        """
        if np.isin(self.where["kind"], (ZIP_STORED, ZIP_DEFLATED)).any():
            return np.stack([self.where["size"], self.where["crc"].astype(np.int64)], axis=1)
        paths = [self.root] if self.root.is_file() else [self.root / name for name in self.names]
        stamps = np.full((len(paths), 2), -1, np.int64)
        for i, path in enumerate(paths):
            with contextlib.suppress(OSError):
                status = path.stat()
                stamps[i] = status.st_size, status.st_mtime_ns
        return stamps

    def take(self, indices: Iterable[int] | NDArray[np.int64]) -> Members:
        chosen = np.asarray(list(indices), np.int64)
        return Members(self.root, [self.names[i] for i in chosen], self.where[chosen], self.inside)

    def read(self, index: int) -> bytes:
        """The bytes of file `index`.

        Raises: UnreadableError when they cannot be had or fail the archive's own checksum.
        """
        offset, size, crc, kind = self.where[index].item()
        try:
            if kind == LEAVING:
                raise UnreadableError("its name leaves the archive's folder")
            if kind == LINK:
                raise UnreadableError("a link inside a tar; pack the file itself")
            if kind == PLAIN:
                return _read_plain(self.root / self.names[index])
            return _read_inside(self.root, offset, size, crc, kind)
        except (OSError, zlib.error, struct.error) as error:
            wrong = isinstance(error, FileNotFoundError) and "\\" in self.names[index]
            hint = "; folders in a path are separated by /, not \\" if wrong else ""
            raise UnreadableError(f"cannot be read: {getattr(error, 'strerror', None) or error}{hint}") from None


def _read_plain(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise UnreadableError("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnreadableError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def _read_inside(archive: Path, offset: int, size: int, crc: int, kind: int) -> bytes:
    with open(archive, "rb") as file:
        if kind != TAR:  # a zip's local header says where the data starts
            file.seek(offset)
            head = file.read(30)
            if head[:4] != b"PK\x03\x04":
                raise UnreadableError("archive damaged: no entry where the index says")
            name_length, extra_length = struct.unpack("<HH", head[26:30])
            offset += 30 + name_length + extra_length
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise UnreadableError("archive ends within the file")
    if kind == ZIP_DEFLATED:
        engine = zlib.decompressobj(-15)
        data = engine.decompress(data, MAX_FILE_BYTES)
        if engine.unconsumed_tail:
            raise UnreadableError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    if kind != TAR and zlib.crc32(data) != crc:
        raise UnreadableError("archive damaged: checksum differs")
    return data


def list_members(root: Path) -> Members:
    """All files under a folder, or in a .zip or an uncompressed .tar, sorted by name (relative, with /).

    Raises: UserError when `root` is none of these.
    """
    if root.is_dir():
        names = sorted(_walk(root))
        files = [name for name in names if not name.endswith("/")]
        folders = tuple(name[:-1] for name in names if name.endswith("/"))
        return Members(root, files, np.zeros(len(files), FIELDS), folders=folders)
    if not root.exists():
        raise UserError(f"No such folder or archive: {root}.")
    try:
        if zipfile.is_zipfile(root):
            return _list_zip(root)
        if tarfile.is_tarfile(root):
            return _list_tar(root)
        with open(root, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise zipfile.BadZipFile("it is cut off: a zip ends with a list of its files")
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        raise UserError(f"{root} is a damaged archive ({error}). Fetch or make it again.") from None
    raise UserError(f"{root} is neither a folder nor a zip or tar archive.")


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all files and, with a / at the end, of all folders; links are followed, but one back into a
    folder above is not entered again."""
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(root / folder)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    yield name + "/"
                    pending.append((name, (*above, identity)))
                else:
                    yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it as a file will say so
        return False


def _list_zip(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        listed = sorted(archive.infolist(), key=lambda info: info.filename)
    infos = [info for info in listed if not info.is_dir()]
    where = np.zeros(len(infos), FIELDS)
    for row, info in enumerate(infos):
        if info.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({info.filename}). Unpack it and give the folder.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path} uses compression type {info.compress_type}; only deflate is read. Unpack it.")
        kind = ZIP_STORED if info.compress_type == zipfile.ZIP_STORED else ZIP_DEFLATED
        where[row] = (info.header_offset, info.compress_size, info.CRC, kind)
    folders = tuple(info.filename.rstrip("/") for info in listed if info.is_dir())
    return _mark_escaping(Members(path, [info.filename for info in infos], where, folders=folders))


def _list_tar(path: Path) -> Members:
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except tarfile.ReadError:
        raise UserError(f"{path} is a compressed tar; only plain ones are read in place. Unpack it.") from None
    with archive:
        members = from_tar(path, tar_files(archive))
        members.folders = tuple(PurePosixPath(member.name).as_posix() for member in archive if member.isdir())
    return members


def from_tar(path: Path, files: Iterable[tuple[str, int, int]]) -> Members:
    """The files of the tar at `path`, as `tar_files` gives them, sorted by name."""
    entries = sorted(files)
    where = np.zeros(len(entries), FIELDS)
    for row, (_, offset, size) in enumerate(entries):
        where[row] = (offset, size, 0, LINK if offset == NOWHERE else TAR)
    return _mark_escaping(Members(path, [name for name, _, _ in entries], where))


def _mark_escaping(members: Members) -> Members:
    """Names without a leading './'; those that climb out of the archive are marked, to be named and never read."""
    for row, name in enumerate(members.names):
        if leaves(name):
            members.where[row]["kind"] = LEAVING
        elif name.startswith("./"):
            members.names[row] = PurePosixPath(name).as_posix()
    return members


def leaves(name: str) -> bool:
    """Whether a member's name points out of its archive: absolute, or through '..'."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")


def is_image_name(name: str) -> bool:
    """Whether a relative name is that of an image: a common suffix in any case, no hidden or macOS side file."""
    return not is_hidden(name) and suffix_of(name) in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a relative name leads to a hidden or macOS side file or folder."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/"))


def suffix_of(name: str) -> str:
    """The ending of a name, with its point, in small letters."""
    return os.path.splitext(name)[1].lower()


def split_archive_path(path: Path) -> tuple[Path, str]:
    """`photos.zip/train` -> (photos.zip, "train"): a folder inside an archive may be named like any other.

    Returns: (existing folder or archive, inner folder or ""). A path that does not exist is returned as it is.
    """
    for parent in [path, *path.parents]:
        if parent.is_file():
            inner = path.relative_to(parent).as_posix()
            return parent, "" if inner == "." else inner
        if parent.is_dir():
            break
    return path, ""


def under(members: Members, folder: str) -> Members:
    """The members inside `folder` (relative, "" for all); names keep their full form."""
    if not folder:
        return members
    prefix = folder.rstrip("/") + "/"
    chosen = members.take([i for i, name in enumerate(members.names) if name.startswith(prefix)])
    chosen.inside, chosen.folders = folder, tuple(name for name in members.folders if name.startswith(prefix))
    return chosen
