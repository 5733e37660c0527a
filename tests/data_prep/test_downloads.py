"""Official archives: fetched from a server of our own, kept, checked; and every way in which that fails."""

import errno
import functools
import http.server
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.sources import downloads, downsampled
from data_prep.sources.downloads import Archive, fetch, unpack
from tests.data_prep.archives import known_as, write_tar

FILES = {"set/a.bin": b"a" * 5000, "set/b.txt": b"b"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    """A small archive on a server of this machine."""
    (tmp_path / "site").mkdir()
    path = write_tar(tmp_path / "site" / "x.tar.gz", FILES)
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield known_as(path, Archive("x.tar.gz", f"http://127.0.0.1:{server.server_port}/x.tar.gz", ""))
        server.shutdown()


def test_fetched_once_and_kept(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch(archive, tmp_path / "cache")
    assert path.read_bytes() == (tmp_path / "site" / "x.tar.gz").read_bytes()
    (tmp_path / "site" / "x.tar.gz").unlink()
    assert fetch(archive, tmp_path / "cache") == path
    folder = unpack(path, ["a.bin", "b.txt"], tmp_path / "cache" / "x")
    assert (folder / "a.bin").read_bytes() == FILES["set/a.bin"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["x", "x.tar.gz"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_download_shows_a_bar_on_a_terminal(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (tmp_path / "site" / "x.tar.gz").stat().st_size
    monkeypatch.setenv("TERM", "xterm")
    for downloaded in (True, False):  # what is there already shows none
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Terminal())
            fetch(archive, tmp_path / "cache")
            shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
        assert (f"{size}/{size} bytes" in shown) == downloaded
    fetch(archive, tmp_path / "another")
    assert "bytes" not in capsys.readouterr().err


def test_a_file_that_is_not_there_or_is_another(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot download .*/none \(HTTPError\)\. Fetch x\.tar\.gz on another machine"):
        fetch(archive._replace(url=archive.url.replace("x.tar.gz", "none")), tmp_path / "cache")
    (tmp_path / "site" / "x.tar.gz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"gave a file of another checksum than the official one \(sha256:"):
        fetch(archive, tmp_path / "cache")
    assert not (tmp_path / "cache" / "x.tar.gz").exists()
    with pytest.raises(UserError, match=r"Cannot download http://127\.0\.0\.1:9/x \(ConnectionError\)"):
        fetch(archive._replace(url="http://127.0.0.1:9/x"), tmp_path / "cache")


FULL = OSError(errno.ENOSPC, "No space left on device")


def raising(error: Exception) -> object:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FULL, r"No room left in .*cache \([\d,]+ MB free\)\. Make room, or give another --cache"),
        (OSError(errno.EFBIG, "File too large"), "No room left in .*cache "),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"Cannot write to .*cache \(Permission denied\)\. Give an",
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), r"Cannot download .* \(ConnectionResetError\)"),
    ],
)
def test_a_cache_that_cannot_be_written_is_no_failed_download(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr("pooch.retrieve", raising(error))
    with pytest.raises(UserError, match=message):
        fetch(archive, tmp_path / "cache")


def test_no_room_to_unpack(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(archive, tmp_path / "cache")
    monkeypatch.setattr(downloads.shutil, "copyfileobj", raising(FULL))
    with pytest.raises(UserError, match=r"No room left in .*cache"):
        unpack(path, ["a.bin"], tmp_path / "cache" / "x")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["x.tar.gz"]


def test_no_room_for_unpacked_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "train_data_batch_1.npz", data=np.zeros((2, 48), np.uint8), labels=[1, 2])
    batches = downsampled.find_batches(tmp_path)
    assert batches is not None
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.files.os.fsync", raising(FULL))
        with pytest.raises(UserError, match=r"No room left in .*cache"):
            downsampled.open_batches(batches, range(1000), tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "unpacked").iterdir()]
    assert len(downsampled.open_batches(batches, range(1000), tmp_path / "cache")[0]["train"]) == 2


def test_an_archive_that_is_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar.gz", {"a.bin": np.random.default_rng(0).bytes(100_000)})
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"x\.tar\.gz is a damaged archive"):
        unpack(path, ["a.bin"], tmp_path / "cache" / "x")
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"x\.tar\.gz is a damaged archive"):
        unpack(path, ["a.bin"], tmp_path / "cache" / "x")
    assert not [*(tmp_path / "cache").iterdir()]
