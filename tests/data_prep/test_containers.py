"""Members of folders and tars: each is read whole, or named; none is lost unsaid."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.sources.containers import list_members
from data_prep.sources.resize import UnreadableError
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import write_tar
from tests.data_prep.small_imagenet import as_tars

FILES = {f"{name}.png": name.encode() * 300 for name in "abcde"}


def contents(path: Path) -> dict[str, bytes]:
    members = list_members(path)
    return {name: members.read(i) for i, name in enumerate(members.names)}


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.JPEG")
    with pytest.raises(UnreadableError, match="not a regular file"):
        list_members(tmp_path).read(0)


def test_links_in_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES, "w")
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("f.png", tarfile.LNKTYPE, "b.png"),
            ("g.png", tarfile.LNKTYPE, "f.png"),
            ("h.png", tarfile.SYMTYPE, "b.png"),
            ("i.png", tarfile.LNKTYPE, "nowhere.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    members = list_members(path)
    assert members.names == [f"{name}.png" for name in "abcdefghi"]
    assert [members.read(i) for i in range(7)] == [*FILES.values(), FILES["b.png"], FILES["b.png"]]
    for i in (7, 8):
        with pytest.raises(UnreadableError, match="a link inside a tar; pack the file itself"):
            members.read(i)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path, kind: int) -> None:
    """Within a header Python's reader would stop without a word."""
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w", format=kind) as archive:
        for name, data in {**FILES, "long" * 40 + ".png": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert len(contents(whole)) == 6
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, end + 512, 128):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.tar is (a damaged archive \(.*\)\. Fetch|neither a folder)"):
            list_members(cut)


def test_a_tar_damaged_in_a_header_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES, "w")
    data = bytearray(path.read_bytes())
    data[3 * 1024 + 150] ^= 1  # the checksum of d.png's header
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar is a damaged archive \(it stops at byte 3,072, without an end mark\)"):
        list_members(path)


def test_a_compressed_tar_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tgz", FILES)
    with pytest.raises(UserError, match=r"x\.tgz is a compressed tar; .* Unpack it"):
        list_members(path)


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_official_tars_not_downloaded_to_their_end(tmp_path: Path, name: str) -> None:
    source = as_tars(tmp_path)
    data = (source / name).read_bytes()
    end = len(data.rstrip(b"\0"))
    for length in (end // 2, (end // 1024) * 1024 - 2048, end):
        (source / name).write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"{name} is a damaged"):
            build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, progress=False, say=str)
