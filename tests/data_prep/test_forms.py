"""The three forms of one build hold the same rows: arrays, FFCV's files and DALI's shards, compared to the bit."""

import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.folder.manifest import read_manifest
from data_prep.folder.verify import verify_folder
from data_prep.work.builder import build_dataset
from tests.data_prep import tiny_builds

PARTS = {"train": 16 + 150, "test": 16}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One call that writes all forms: 166 rows for training, in shards of 50, and 16 for testing."""
    root = tmp_path_factory.mktemp("forms")
    tiny_builds.make_images(root / "raw", unlabeled=150)
    places = {key: root / "raw" / key for key in ("labeled", "unlabeled", "test")}
    return build_dataset(
        "folder", root / "out", **places, resolution=12, formats=("ffcv", "dali"), shard_images=50, progress=False
    )


def from_array(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{part}.npy"), np.load(folder / f"{part}_labels.npy")


def from_ffcv(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels in the file's order, as its own tables place them."""
    from ffcv.reader import Reader

    reader = Reader(str(folder / f"{part}.beton"))
    image, label = (reader.metadata[name] for name in reader.metadata.dtype.names)
    assert reader.handlers.keys() == {"image", "label"}
    data = (folder / f"{part}.beton").read_bytes()
    rows = []
    for mode, height, width, offset in (tuple(entry) for entry in image):
        assert mode == 1  # raw pixels
        rows.append(np.frombuffer(data, np.uint8, int(height) * int(width) * 3, int(offset)).reshape(height, width, 3))
    return np.stack(rows), np.asarray(label, np.int64)


def from_dali(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels by row, from the tars, whose order is the recorded permutation."""
    side, members, order = read_manifest(folder).resolution, {}, []
    for path in sorted((folder / f"{part}-dali").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, kind = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                members[int(stem), kind] = content.read()
                if kind == "bin":
                    order.append(int(stem))
    assert order == np.load(folder / f"{part}-dali" / "order.npy").tolist()
    rows = range(len(order))
    ids = np.array([np.frombuffer(members[row, "ids"], "<i8") for row in rows])
    assert ids[:, 0].tolist() == [*rows]
    pixels = [np.frombuffer(members[row, "bin"], np.uint8).reshape(side, side, 3) for row in rows]
    return np.stack(pixels), ids[:, 1]


@pytest.mark.parametrize("part", PARTS)
def test_the_three_forms_are_the_same_rows(folder: Path, part: str) -> None:
    images, labels = from_array(folder, part)
    assert images.shape == (PARTS[part], 12, 12, 3)
    assert len({image.tobytes() for image in images}) == PARTS[part]  # each row can be told from each other
    for read in (from_ffcv, from_dali):
        other_images, other_labels = read(folder, part)
        assert np.array_equal(other_images, images)
        assert np.array_equal(other_labels, labels)


def test_all_files_are_listed_and_the_command_names_the_formats(folder: Path) -> None:
    manifest = read_manifest(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest.files) == present - {"manifest.json"}
    assert len([name for name in manifest.files if name.startswith("train-dali/") and name.endswith(".tar")]) == 4
    assert "--shard-images 50" in manifest.command
    assert manifest.command.endswith("--format ffcv,dali")
    verify_folder(folder)
