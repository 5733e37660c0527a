"""Data folders for the tests of this package."""

import importlib.util
import io
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from PIL import Image

from tests.pipelines import folders


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training images of 16 px, 12 of them labeled, all unlabeled, and 11 test images. Not to be changed."""
    return folders.write_folder(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def ffcv_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with .beton files. Not to be changed."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    from data_prep.folder.beton import write_betons

    folder = folders.write_folder(tmp_path_factory.mktemp("data") / "tiny")
    write_betons(folder, ("train", "test"))
    folders.refresh_manifest(folder)
    return folder


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a train.beton of JPEGs, of 24 px. Not to be changed."""
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    from data_prep.folder.beton import write_betons

    folder = folders.write_folder(tmp_path_factory.mktemp("data") / "tiny", side=24)
    write_betons(folder, ("train", "test"), kept_as="jpeg90")
    folders.refresh_manifest(folder, origin={"beton": "jpeg90"})
    return folder


@pytest.fixture(scope="session")
def dali_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with shards of 16 images for DALI. Not to be changed."""
    if importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    from data_prep.folder.dali import write_dali

    folder = folders.write_folder(tmp_path_factory.mktemp("data") / "tiny")
    for part in ("train", "test"):
        write_dali(folder, part, shard_images=16)
    folders.refresh_manifest(folder)
    return folder


@pytest.fixture(params=["resident", "ffcv", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every back end in turn."""
    return request.param


@pytest.fixture
def data(backend: str, request: pytest.FixtureRequest) -> Path:
    """A folder that this back end reads."""
    return request.getfixturevalue({"resident": "folder"}.get(backend, f"{backend}_folder"))


@pytest.fixture
def stored(folder: Path) -> np.ndarray:
    """The training images of `folder` (the others hold the same)."""
    return np.load(folder / "train.npy")


@pytest.fixture(scope="session")
def shared_images(shared_data: Path) -> Callable[[int], np.ndarray]:
    """Real images: a function from the side in pixels to (60, side, side, 3) uint8."""
    with zipfile.ZipFile(shared_data / "cifar10_jpeg.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith((".jpg", ".jpeg", ".png"))]
        chosen = names[:: len(names) // 60][:60]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
    return lambda side: np.stack([np.asarray(picture.resize((side, side))) for picture in pictures])


@pytest.fixture
def threads_before() -> int:
    """How many threads run; kernels' own pools are started first, since they stay."""
    torch.get_num_threads(), numba.get_num_threads()
    return threading.active_count()
