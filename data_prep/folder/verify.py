"""`build.py verify`: every file of a data folder against the manifest's checksums."""

from __future__ import annotations

from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import sha256_of
from data_prep.folder.manifest import MANIFEST_NAME, Manifest, parse_manifest
from data_prep.progress import Bar


def verify_folder(folder: Path) -> None:
    """Read every listed file again. Prints a line when all is well.

    Raises: UserError that names each damaged file and what is wrong with it, or that there is no data set.
    """
    manifest = parse_manifest(folder)
    total = sum(entry.bytes for entry in manifest.files.values())
    damage = []
    with Bar("verify", "bytes", total) as bar:
        for name in manifest.files:
            problem = _problem(folder, name, manifest)
            if problem:
                damage.append(f"{name} ({problem})")
            bar.update(manifest.files[name].bytes)
    if damage:
        raise UserError(f"{folder} is damaged: {', '.join(damage)}. Build it again: {manifest.remedy}")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST_NAME}
    extra = sorted(present - set(manifest.files))
    note = f"; not part of it: {', '.join(extra[:5])}" if extra else ""
    print(f"{folder}: all {len(manifest.files)} files are as they were written ({total / 1e6:,.1f} MB){note}")


def _problem(folder: Path, name: str, manifest: Manifest) -> str:
    """What is wrong with a file, "" when nothing."""
    path, expected = folder / name, manifest.files[name]
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"{size:,} bytes instead of {expected.bytes:,}"
    return "" if sha256_of(path) == expected.sha256 else "checksum differs"
