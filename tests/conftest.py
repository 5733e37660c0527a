"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest

# Tests must never reach for a login or the network.
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project: the one that holds pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images beside the project; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of real images at {folder}")
    return folder
