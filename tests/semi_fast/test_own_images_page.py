"""docs/own_images.md: every command of the page does what the page says, from photographs to the second round.

The pretrained network's weights come from a file instead of the network, at 64 px; without timm, a small network trains
in its place. FFCV's commands are left out where it is not installed. tests/test_readme.py parses all of them.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import save_file

from data_prep import build
from data_prep.folder.manifest import read_manifest
from semi_fast.run.summary import read_summary
from tests.drawn_photos import write_photos
from tests.semi_fast.trained_runs import SMALL, command, training

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own_images.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SHELL = ("(cd ", "awk ")
PRETRAINED = ["net=timm/resnet18", "net.weights=pretrained"]
TIMM, FFCV = (find_spec(name) is not None for name in ("timm", "ffcv"))
QUICK = [*SMALL, "ceiling=off", "batch=4", "steps=2", "eval_every=1", "log_every=1", "method=fixmatch"]
LABELED, UNLABELED, NEW = {"disc": 10, "star": 6, "square": 5}, {"disc": 8, "star": 5, "square": 3}, {"disc": 2}


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """One command of the page; training in as few steps and as small a network as there is. Returns the exit code."""
    program, *words = shlex.split(line)
    if line.startswith(SHELL):
        return subprocess.run(["bash", "-c", line], check=False).returncode
    if words[0] == "data_prep/build.py":
        monkeypatch.setattr(sys, "argv", ["64" if word == "224" else word for word in words])
        return build.main()
    if program == "accelerate":
        settings = words[words.index("semi_fast/train.py") + 1 :]
        training.main([*(word for word in settings if word not in PRETRAINED), *QUICK, *network(settings)])
        return 0
    assert words[:2] == ["-m", "semi_fast"]
    return command(*words[2:])


def network(settings: list[str]) -> list[str]:
    """What stands for the pretrained network of these settings: the same with weights of its own, if there is timm."""
    if not (TIMM and set(PRETRAINED) <= set(settings)):
        return []
    import timm

    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), "resnet18.safetensors")
    return [PRETRAINED[0], "net.weights=resnet18.safetensors"]


def fill_in() -> int:
    """The second step of the user: labels for to_label.csv. Returns how many are new: all but the first line's."""
    path = Path("runs/mine/to_label.csv")
    with path.open() as file:
        lines = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows({**line, "label": line["pseudo_label"] if i else ""} for i, line in enumerate(lines))
    path.write_bytes(path.read_bytes().rstrip())  # as editors may leave it
    return len(lines) - 1


def test_from_photographs_to_the_second_round(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    fresh_accelerator: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), LABELED, UNLABELED, NEW)
    new = 0
    assert sum("ffcv" in line for line in LINES) == sum(PRETRAINED[1] in line for line in LINES) == 2
    for line in LINES:
        if "ffcv" in line and not FFCV:
            continue
        if line.startswith("awk "):
            new = fill_in()
            assert len(Path("photos/labels.csv").read_text().splitlines()) == 1 + sum(LABELED.values())
        assert run(line, monkeypatch) == 0, line
    assert "turned as EXIF asks" in capsys.readouterr().out
    first, second = (read_manifest(Path("data") / name) for name in ("mine", "mine2"))
    assert first.validation_counts == first.test_counts == [2, 1, 1]
    held = sum(second.test_counts) + sum(second.validation_counts or [])
    assert (new > 5, sum(second.labeled_counts) + held) == (True, sum(LABELED.values()) + new)
    for name in ("mine", "mine224", "mine2", *(["mine_jpeg"] if FFCV else [])):
        summary = read_summary(Path("runs") / name)
        assert summary is not None
        assert (summary.figure, summary.chosen_by) == ("best", "validation")
    with open("predictions.csv") as file:
        assert [Path(line["image"]).parent.name for line in csv.DictReader(file)] == ["new"] * 2
    facts = {entry.key: entry.value for entry in onnx.load("model.onnx").metadata_props}
    assert [facts[key] for key in ("exif", "fit", "resolution", "resize_filter")] == ["apply", "crop", "64", "box"]
    assert json.loads(facts["class_names"]) == ["disc", "square", "star"]
