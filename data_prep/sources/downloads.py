"""Official archives: fetched with a progress bar, or found on disk, and checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.files import is_full
from data_prep.progress import Bar

CHUNK = 1 << 16  # bytes of a download that are written at a time


class Archive(NamedTuple):
    """An official file: its name, where it is published, and its checksums in hex (SHA-256 "" where not published)."""

    file: str
    url: str
    md5: str
    sha256: str = ""


def default_cache() -> Path:
    """Where downloads are kept: the user's cache folder, ~/.cache/semi-fast on Linux."""
    import pooch

    return Path(pooch.os_cache("semi-fast"))


def fetch(archive: Archive, cache: Path) -> Path:
    """The archive in `cache`, downloaded when it is not there yet.

    Raises: UserError when it cannot be had (says which file to fetch) or its checksum is wrong.
    """
    import pooch
    import requests

    path = cache / archive.file
    known = f"sha256:{archive.sha256}" if archive.sha256 else f"md5:{archive.md5}"
    with keeping(cache), Bar(archive.file, "bytes") as bar:
        downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK)
        try:
            pooch.retrieve(archive.url, known_hash=known, fname=archive.file, path=cache, downloader=downloader)
        except (requests.RequestException, ConnectionError, TimeoutError) as error:
            raise UserError(
                f"Cannot download {archive.url} ({type(error).__name__}). Fetch {archive.file} on another machine and "
                f"give it with --source, or put it into {cache}."
            ) from None
        except ValueError:
            raise UserError(
                f"{archive.url} gave a file of another checksum than the official one ({known}). Try again later, or "
                "give a good copy with --source."
            ) from None
    check(path, [archive])
    return path


@contextlib.contextmanager
def keeping(cache: Path) -> Iterator[None]:
    """Within: an OSError is one of writing into the folder of downloads, and becomes a UserError that says so."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise UserError(f"Cannot write to {cache} ({error.strerror or error}). Give another --cache.") from None
        existing = next(folder for folder in [cache, *cache.absolute().parents] if folder.exists())
        free = shutil.disk_usage(existing).free / 1e6
        message = f"No room left in {cache} ({free:,.0f} MB free). Make room, or give another --cache."
        raise UserError(message) from None


def check(path: Path, known: list[Archive]) -> Archive:
    """Which of the official archives `path` is, by its MD5 (and SHA-256 where published).

    Raises: UserError when it is none of them: a truncated or altered download.
    """
    digests = file_digests(path)
    for archive in known:
        if digests["md5"] == archive.md5 and archive.sha256 in ("", digests["sha256"]):
            return archive
    expected = ", ".join(f"{archive.md5} ({archive.file})" for archive in known)
    raise UserError(
        f"{path} has MD5 {digests['md5']}; the official one is {expected}. Download it again, or unpack it and give "
        "the folder with --source."
    )


def file_digests(path: Path) -> dict[str, str]:
    """MD5 and SHA-256 of a file, in hex."""
    totals = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            for total in totals.values():
                total.update(block)
    return {name: total.hexdigest() for name, total in totals.items()}


def unpack(archive: Path, names: Sequence[str], folder: Path) -> Path:
    """Take the files `names` out of a tar, wherever in it they lie, into `folder`; once: a finished folder is kept.

    Only these plain names are ever written. Raises: UserError when the archive is damaged or lacks one.
    """
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with keeping(folder.parent):
            temporary.mkdir(parents=True)
            _extract(archive, names, temporary)
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _extract(archive: Path, names: Sequence[str], folder: Path) -> None:
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                source = tar.extractfile(member) if name in names else None
                if source is not None:
                    with source, open(folder / name, "wb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is a damaged archive ({error}). Download it again.") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}. Download it again.")
