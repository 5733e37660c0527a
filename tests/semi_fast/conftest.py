"""A real data folder, small enough to train on in a test."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from data_prep.builder import build_dataset


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits set, built once."""
    folder = tmp_path_factory.mktemp("data") / "digits-lt"
    build_dataset("digits-lt", folder, progress=False, say=lambda line: None)
    return folder


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
