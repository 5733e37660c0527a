"""Small archives in the exact byte layout of the official ones, and image files of every kind."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.downloads import Archive


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """(count, side, side, 3) uint8 noise: every image differs from every other."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    """A tar of these files, in this order."""
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def known_as(path: Path, archive: Archive) -> Archive:
    """`archive` with the checksums of the file at `path`."""
    data = path.read_bytes()
    return archive._replace(md5=hashlib.md5(data).hexdigest(), sha256=hashlib.sha256(data).hexdigest())


def cifar_binary(labels: np.ndarray, images: np.ndarray, coarse: bool = False) -> bytes:
    """Records of [coarse label,] label, 1024 red, 1024 green, 1024 blue bytes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    head = [np.zeros_like(labels), labels] if coarse else [labels]
    return np.hstack([np.stack(head, 1).astype(np.uint8), planes]).tobytes()


def python2_pickle(batch: dict[str, object]) -> bytes:
    """A dictionary with one uint8 matrix, as Python 2 wrote it: protocol 2, byte strings, NumPy's old module names."""
    out = io.BytesIO()
    out.write(b"\x80\x02}(")
    for key, value in batch.items():
        out.write(b"U" + bytes([len(key)]) + key.encode())
        if isinstance(value, np.ndarray):
            out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R")
            out.write(b"(K\x01K" + bytes([value.shape[0]]) + b"M" + int(value.shape[1]).to_bytes(2, "little") + b"\x86")
            out.write(b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")
            out.write(b"\x89T" + value.nbytes.to_bytes(4, "little") + value.tobytes() + b"tb")
        elif isinstance(value, str):
            out.write(b"U" + bytes([len(value)]) + value.encode())
        else:
            out.write(b"](" + b"".join(_python2_item(item) for item in value) + b"e")
    out.write(b"u.")
    return out.getvalue()


def _python2_item(item: object) -> bytes:
    return b"U" + bytes([len(item)]) + item.encode() if isinstance(item, str) else b"K" + bytes([int(item)])


def python3_pickle(batch: dict[str, object]) -> bytes:
    """The same as Python 3 writes it at protocol 2."""
    return pickle.dumps(batch, protocol=2)


def write_class_folders(root: Path, images: Mapping[str, list[np.ndarray]], suffix: str = ".png") -> None:
    """root/<class>/<number>.png"""
    for name, members in images.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(members):
            (root / name / f"{number:04d}{suffix}").write_bytes(encoded(image))
