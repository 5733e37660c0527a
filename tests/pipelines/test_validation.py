"""Validation images: rows of train.npy that are read by themselves, and by no stream of training."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.folder.beton import write_betons
from data_prep.folder.dali import write_dali
from pipelines.arrays import open_arrays
from tests.pipelines import folders
from tests.pipelines.test_backends import open_tiny, stored_pixels, take

ROWS = np.array([20, 23, 31, 40, 44, 45, 49])


def counts(rows: np.ndarray) -> list[int]:
    return np.bincount(rows % folders.CLASSES, minlength=folders.CLASSES).tolist()


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder with seven validation images, in the form of every back end that is installed."""
    folder = folders.write_folder(tmp_path_factory.mktemp("data") / "tiny")
    np.save(folder / "unlabeled_rows.npy", np.setdiff1d(np.arange(50), ROWS))
    np.save(folder / "validation_rows.npy", ROWS)
    if find_spec("ffcv"):
        write_betons(folder, ("train", "test"))
    for part in ("train", "test"):
        write_dali(folder, part, shard_images=16)
    folders.refresh_manifest(folder, validation_counts=counts(ROWS))
    return folder


def test_every_back_end_reads_them_apart_from_training(backend, validated):
    pytest.importorskip({"dali": "nvidia.dali", "ffcv": "ffcv"}.get(backend, "numpy"))
    loaders, images = open_tiny(validated, backend), open_arrays(validated).train
    assert (loaders.info.num_validation, loaders.info.num_unlabeled) == (7, 43)
    seen = {int(row) for batch in take(loaders, 25) for row in torch.cat(list(batch.rows.values()))}
    assert seen == set(range(50)) - set(ROWS.tolist())
    for world in (1, 3):
        shares = [list(open_tiny(validated, backend, rank=k, world=world).validation(2)) for k in range(world)]
        pixels = np.concatenate([stored_pixels(loaders, x) for share in shares for x, _ in share])
        np.testing.assert_array_equal(pixels, images[ROWS])
        assert [int(k) for share in shares for _, y in share for k in y] == (ROWS % folders.CLASSES).tolist()


def test_without_them_there_are_none(folder):
    assert list(open_tiny(folder, "resident").validation()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([20, 50], r"validation_rows\.npy: values must be within 0\.\.49, got 20\.\.50"),
        ([20, 21], "a validation row must be neither labeled nor unlabeled"),
        ([3, 20], "a validation row must be neither labeled nor unlabeled"),
        ([20, 23], r"validation_counts of manifest\.json are not those of the label arrays"),
    ],
)
def test_wrong_rows_are_refused(validated, tmp_path, rows, message):
    folder = Path(shutil.copytree(validated, tmp_path / "data"))
    np.save(folder / "validation_rows.npy", np.array(rows))
    wrong = counts(np.array(rows)) if rows != [20, 23] else counts(ROWS)
    folders.refresh_manifest(folder, validation_counts=wrong)
    with pytest.raises(UserError, match=message):
        open_arrays(folder)


def test_a_manifest_says_whether_there_are_some(validated):
    with pytest.raises(ValueError, match=r"files must list validation_rows\.npy where there are validation_counts"):
        folders.refresh_manifest(validated)
