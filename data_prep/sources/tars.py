"""Where the files of an uncompressed tar lie, so that they can be read in place."""

from __future__ import annotations

import tarfile

NOWHERE = -1


def tar_files(archive: tarfile.TarFile) -> list[tuple[str, int, int]]:
    """The files and links of an open, uncompressed tar, in its order: (name, first byte, size).

    A hard link lies where the file lies that it links to; other links lie NOWHERE.

    Raises: tarfile.TarError when the tar stops before its end mark. Python's own reader takes that for the end, and
        whatever is missing would go unnoticed.
    """
    files: dict[str, tuple[int, int]] = {}
    entries = []
    for member in archive:
        if member.isreg():
            files[member.name] = (member.offset_data, member.size)
        elif member.islnk():
            files[member.name] = files.get(member.linkname, (NOWHERE, 0))
        elif member.issym():
            files[member.name] = (NOWHERE, 0)
        else:
            continue
        entries.append((member.name, *files[member.name]))
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it stops at byte {archive.offset:,}, without an end mark")
    return entries
