"""A real data folder, small enough to train on in a test."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from data_prep.work.builder import build_dataset


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits set, built once."""
    folder = tmp_path_factory.mktemp("data") / "digits-lt"
    build_dataset("digits-lt", folder, progress=False, say=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """Three classes of noise of different brightness, 8 x 8: 12, 6 and 3 labeled images, quick to train on.

    With DALI's shards, and with a .beton where FFCV is installed.
    """
    place, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, counts in (("labeled", (12, 6, 3)), ("unlabeled", (20, 20, 20)), ("test", (6, 6, 6))):
        for k, count in enumerate(counts):
            (place / part / f"class{k}").mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(60 + 60 * k, 50, (8, 8, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / part / f"class{k}" / f"{i}.png")
    return build_dataset(
        "folder",
        tmp_path_factory.mktemp("data") / "tiny",
        labeled=place / "labeled",
        unlabeled=place / "unlabeled",
        test=place / "test",
        resolution=8,
        formats=["dali", "ffcv"] if find_spec("ffcv") else ["dali"],
        workers=1,
        progress=False,
        say=lambda line: None,
    )


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its state for the whole process; a test that trains starts and leaves it empty."""

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture(scope="session")
def semi_run(tmp_path_factory, digits) -> Path:
    """A finished run of SeMi on the digits set, of six steps; tests copy it before they change it."""
    from tests.semi_fast.trained_runs import train

    # A low threshold, so that the bank has something to show after so few steps.
    return train(tmp_path_factory.mktemp("runs") / "semi", digits, "method.tau=0.12")


@pytest.fixture
def quick(monkeypatch):
    """t-SNE is looked at once; elsewhere two of the features do."""
    from semi_fast.reporting import embedding

    monkeypatch.setattr(embedding, "project", lambda features: features[:, :2].astype(float))
