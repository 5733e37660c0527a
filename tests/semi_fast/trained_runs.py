"""Short real runs for tests of what comes after training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from data_prep.folder.manifest import file_entry, read_manifest, write_manifest
from semi_fast import __main__
from semi_fast import train as training

SMALL = [
    *("net=wrn10_1", "net.bn_momentum=0.1", "ema.decay=0.5", "batch=8", "threads=1"),
    *("precision=fp32", "wandb=off", "report=off"),
]
ODD_NAMES = ("<script>alert(1)<", "a & b's", "$5^$ \u00e9\u732b")  # of classes, as folders may be named


def command(*words: str | Path) -> int:
    """Run `python -m semi_fast` with these words; returns the exit code."""
    return __main__.main([str(word) for word in words])


def train(folder: Path, data: Path, *more: str, method: str = "semi", steps: int = 6) -> Path:
    """Train for a few steps into `folder`; Accelerate's state of the process is left empty."""
    options = [f"data={data}", f"method={method}", f"run_dir={folder}", f"steps={steps}", "log_every=2", "eval_every=3"]
    _reset()
    try:
        training.main(["digits_lt", *SMALL, "ceiling=off", *options, *more])
    finally:
        _reset()
    return folder


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run that a test may damage."""
    return Path(shutil.copytree(run, folder))


def edit_config(run: Path, old: str, new: str) -> None:
    """Replace a part of a run's settings."""
    path = run / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def odd_images(folder: Path) -> Path:
    """A folder of images, as `build.py folder` takes it, with class names that pages and drawings may trip over."""
    random = np.random.default_rng(0)
    for part, each in (("labeled", 5), ("test", 4)):
        for k, name in enumerate(ODD_NAMES):
            inside = folder / part / name
            inside.mkdir(parents=True)
            for i in range(each - k):
                Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(inside / f"{i}.png")
    (folder / "all").mkdir()
    for i in range(10):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "all" / f"{i}.png")
    return folder


def without_test_images(data: Path, folder: Path) -> Path:
    """A copy of a data folder, whole but for its test images."""
    manifest = read_manifest(data)
    shutil.copytree(data, folder)
    files = dict(manifest.files)
    for name in ("test.npy", "test_labels.npy"):
        np.save(folder / name, np.load(data / name)[:0])
        files[name] = file_entry(folder / name)
    none = [0] * len(manifest.class_names)
    write_manifest(folder, manifest.model_copy(update={"files": files, "test_counts": none}))
    return folder


def log_lines(run: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
