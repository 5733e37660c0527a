"""Any damage to any file of a data folder, in every form, at every step: refused or without effect, never certified."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.folder import dali, formats
from data_prep.folder.finished import record_finished
from data_prep.folder.manifest import ARRAYS
from data_prep.folder.verify import verify_folder
from data_prep.work import filling
from data_prep.work.builder import build_dataset
from data_prep.work.unfinished import work_folder
from pipelines import Stream, open_loaders
from pipelines.backends import ffcv
from tests.data_prep import tiny_builds

BACKENDS = ["resident", *(name for name, module in (("ffcv", "ffcv"), ("dali", "nvidia.dali")) if find_spec(module))]
FORMS = [name for name in ("ffcv", "dali") if name == "dali" or "ffcv" in BACKENDS]
#: Tests run with few examples, and with many where minutes do not matter.
EXAMPLES = pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.slow)])


class Damage(NamedTuple):
    """What happens to a file: the one of that number, at a place given as a share of its size."""

    kind: str
    file: int
    place: float
    length: int
    mask: int

    def harm(self, folder: Path) -> str:
        """Do it. Returns the file's relative name."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = files[self.file % len(files)]
        data = path.read_bytes()
        start = int(self.place * (len(data) - 1))
        stop = min(start + self.length, len(data))
        flipped = bytes(byte ^ self.mask for byte in data[start:stop])
        harmed = {
            "flip": data[:start] + flipped + data[stop:],
            "range gone": data[:start] + data[stop:],
            "cut": data[:start],
        }
        path.unlink()
        if self.kind in harmed:
            path.write_bytes(harmed[self.kind])
        return path.relative_to(folder).as_posix()


DAMAGES = st.builds(
    Damage,
    kind=st.sampled_from(["flip", "range gone", "cut", "file gone"]),
    file=st.integers(0, 1000),
    place=st.floats(0, 1),
    length=st.integers(1, 300),
    mask=st.integers(1, 255),
)


def each(examples: int, check: Callable[[Damage], None]) -> None:
    """Run a check of a damage so many times."""
    options = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    options(given(DAMAGES)(check))()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


class StopError(Exception):
    pass


class Builds:
    """Builds of one source into `out`, quick ones: pictures are not drawn, FFCV's files are copied once they exist."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.out, self.patch = root, root / "out", patch
        tiny_builds.make_images(root / "raw", unlabeled=40)
        patch.setattr(filling, "CHUNK", 16)
        patch.setattr("data_prep.folder.preview.write_preview", lambda path, *_: path.write_bytes(b"picture" * 100))
        self.build(FORMS)
        self.whole = self.out.rename(root / "whole")
        patch.setattr(formats, "write_betons", self.copy_betons)

    def build(self, forms: Sequence[str]) -> None:
        places = {key: self.root / "raw" / key for key in ("labeled", "unlabeled", "test")}
        shards = 16 if "dali" in forms else None
        silent = {
            "progress": False,
            "say": lambda line: None,
            "workers": 1,
            "command": "python data_prep/build.py folder",
        }
        build_dataset("folder", self.out, **places, resolution=8, formats=forms, shard_images=shards, **silent)

    def copy_betons(self, folder: Path, parts: Sequence[str], record: str, kept_as: str) -> None:
        for part in parts:
            shutil.copyfile(self.whole / f"{part}.beton", folder / f"{part}.beton")
            record_finished(folder, "ffcv", record, [folder / f"{part}.beton"])

    def finished(self, forms: Sequence[str], name: str) -> Path:
        """A finished folder, moved away from `out`."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.build(forms)
        return self.moved(self.out, name)

    def moved(self, folder: Path, name: str) -> Path:
        """A folder, moved to that name; another number of examples may have left one there."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        return folder.rename(self.root / name)

    def interrupted(self, forms: Sequence[str]) -> None:
        """A call that ends after two shards."""
        real, written = dali._write_tar, []

        def write_tar(path: Path, *arguments: object) -> list[dali.Sample]:
            written.append(path)
            if len(written) == 3:
                raise StopError
            return real(path, *arguments)  # type: ignore[arg-type]

        with self.patch.context() as patch:
            patch.setattr(dali, "_write_tar", write_tar)
            with pytest.raises(StopError):
                self.build(forms)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    with pytest.MonkeyPatch.context() as patch:
        yield Builds(tmp_path_factory.mktemp("builds"), patch)


@pytest.fixture(scope="module")
def whole(builds: Builds) -> dict[str, bytes]:
    """What a build of all forms holds."""
    return contents(builds.whole)


@EXAMPLES
def test_verify(builds: Builds, examples: int) -> None:
    def check(damage: Damage) -> None:
        name = damage.harm(copy(builds.whole, builds.out))
        with pytest.raises(UserError, match="manifest" if name == "manifest.json" else name) as caught:
            verify_folder(builds.out)
        assert "\n" not in str(caught.value)

    each(examples, check)


def is_read(name: str, backend: str) -> bool:
    """Whether a back end reads a file of a data folder."""
    folder, _, ending = name.partition("/")[0], *name.rpartition(".")[1:]
    if folder == "train-dali":
        return backend == "dali" and (ending == "tar" or (ending == "idx" and name.count("/") == 2))
    return name in (*ARRAYS, "manifest.json") or (ending == "beton" and backend == "ffcv")


@EXAMPLES
@pytest.mark.parametrize("backend", BACKENDS)
def test_training(builds: Builds, backend: str, examples: int) -> None:
    streams = {"labeled": Stream("labeled", ("weak",)), "unlabeled": Stream("unlabeled", ("weak",))}
    place = {"device": torch.device("cpu"), "dtype": torch.float32}

    def check(damage: Damage) -> None:
        name = damage.harm(copy(builds.whole, builds.out))
        try:
            open_loaders(builds.out, streams, batch=4, seed=0, backend=backend, **place).close()
        except UserError:
            pass
        else:
            assert not is_read(name, backend)
            assert (builds.out / name).exists()
            assert (builds.out / name).stat().st_size == (builds.whole / name).stat().st_size

    with builds.patch.context() as patch:  # FFCV, which is slow to load, is not asked: the file's checksum decides
        patch.setattr(ffcv, "require_ffcv", lambda: None)
        patch.setattr(ffcv, "check_beton", lambda path, images, kept_as="raw": None)
        each(examples, check)


@EXAMPLES
@pytest.mark.parametrize("added", FORMS)
def test_adding_a_format(builds: Builds, added: str, examples: int) -> None:
    others = [form for form in FORMS if form != added]
    template = builds.finished(others, f"without {added}")

    def check(damage: Damage) -> None:
        damage.harm(copy(template, builds.out))
        before = contents(builds.out)
        with pytest.raises(UserError, match=r"damaged|not valid|schema version|is no data set \(no manifest\.json\)"):
            builds.build(FORMS)
        assert contents(builds.out) == before

    each(examples, check)


@EXAMPLES
def test_resuming_an_added_format(builds: Builds, whole: dict[str, bytes], examples: int) -> None:
    builds.finished([form for form in FORMS if form != "dali"], "lacking").rename(builds.out)
    builds.interrupted(FORMS)
    template = builds.moved(builds.out, "half added")

    def check(damage: Damage) -> None:
        name = damage.harm(copy(template, builds.out))
        before = contents(builds.out)
        listed = "dali" not in name  # what the manifest vouches for, and the manifest
        try:
            builds.build(FORMS)
        except UserError:
            assert listed
            assert contents(builds.out) == before
        else:
            assert not listed
            assert data(contents(builds.out)) == data(whole)
            verify_folder(builds.out)

    each(examples, check)


def data(files: dict[str, bytes]) -> dict[str, bytes]:
    """All but the manifest, which tells of the call that added a format."""
    return {name: content for name, content in files.items() if name != "manifest.json"}


@EXAMPLES
def test_resuming_a_build(builds: Builds, whole: dict[str, bytes], examples: int) -> None:
    work = work_folder(builds.out)
    for left in (builds.out, work):
        shutil.rmtree(left, ignore_errors=True)
    builds.interrupted(FORMS)
    template = builds.moved(work, "template")
    ended = []

    def check(damage: Damage) -> None:
        shutil.rmtree(builds.out, ignore_errors=True)
        damage.harm(copy(template, work))
        try:
            builds.build(FORMS)
        except UserError:
            assert not builds.out.exists()
        else:
            assert contents(builds.out) == whole
            assert not work.exists()
            ended.append(damage)

    each(examples, check)
    assert ended
