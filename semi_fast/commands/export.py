"""A run's model as ONNX (needs the extra `[export]`).

The exported model takes what an image file gives, so that nobody has to repeat the run's normalization:

    images         (n, 3, H, W) uint8 RGB, H = W = the run's resolution, any n
    logits         (n, K) float32 of the reported head
    probabilities  (n, K) float32, softmax of the logits

Its metadata hold `class_names` and `split` (JSON), `mean` and `std` (of pixels / 255, as the weights know them, applied
inside), `data`, `method`, `weights` and `step`; and how an image file becomes `images`: `exif`, `fit`,
`resolution`, `resize_filter` and `pad_color` (JSON, null without), each as the option of data_prep/build.py folder.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines import Info
from semi_fast.methods import Method
from semi_fast.nets.backbone import Backbone
from semi_fast.run.log import write_file
from semi_fast.run.saved import Step, Trained, Weights, load_trained

NEEDED = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-3  # largest difference of a logit, relative to the largest one, that is put down to rounding


class Classifier(nn.Module):
    """A method's reported head behind the run's normalization: (n, 3, H, W) uint8 -> logits, probabilities (n, K)."""

    mean: Tensor
    std: Tensor

    def __init__(self, method: Method, info: Info) -> None:
        super().__init__()
        self.method = method
        for name, values in (("mean", info.mean), ("std", info.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.method.predict((images.float() / 255 - self.mean) / self.std)[self.method.reported]
        return logits, logits.softmax(1)


def export(run: Path, onnx: Path, *, weights: Weights | None, step: Step) -> None:
    """Write a run's model to the file `onnx`, and say how far it is from torch's. weights, step: see `load_trained`."""
    if onnx.suffix.lower() != ".onnx":
        raise UserError(f"--onnx must end in .onnx, got {onnx}.")
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"Export needs {', '.join(lacking)}. Install them: pip install -e '.[export]'.")
    trained = load_trained(run, weights=weights, step=step)
    difference = export_onnx(trained, onnx)
    facts = f"{onnx.stat().st_size / 1e6:.1f} MB, step {trained.step:,}, {trained.weights} weights"
    print(f"{onnx}: {facts}; logits differ from torch's by at most {difference:.1e}")


def export_onnx(trained: Trained, path: Path) -> float:
    """Write the model to `path`, once onnxruntime gives what torch gives.

    Returns: the largest difference of a logit over random images, for one image and for several.
    Raises: UserError when the file cannot be written; ArithmeticError when the exported model computes something else.
    """
    info = trained.facts.info
    model = Classifier(trained.method, info).eval()
    content = _convert(model, trained)
    difference = _check(content, model, info)
    write_file(path, content)
    return difference


def _convert(model: Classifier, trained: Trained) -> bytes:
    import onnx

    info, side = trained.facts.info, trained.facts.info.resolution
    example = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("n", min=1)}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    net = trained.method.net
    facts: dict[str, Any] = {
        **{name: getattr(info, name) for name in ("class_names", "resolution", "mean", "std")},
        **(net.constants() if isinstance(net, Backbone) else {}),
        **{name: getattr(trained.facts, name) for name in ("resize_filter", "fit", "exif", "pad_color")},
        "data": info.name,
        "split": trained.facts.split,
        "method": trained.settings.method.name,
        "weights": trained.weights,
        "step": trained.step,
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    proto = program.model_proto
    onnx.helper.set_model_props(proto, texts)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _check(content: bytes, model: Classifier, info: Info) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    worst = 0.0
    for count in (1, 5):
        images = random.integers(0, 256, (count, 3, info.resolution, info.resolution), np.uint8)
        with torch.no_grad():
            wanted = [out.numpy() for out in model(torch.from_numpy(images))]
        got = session.run(["logits", "probabilities"], {"images": images})
        differences = [float(np.abs(a - b).max()) for a, b in zip(wanted, got, strict=True)]
        if not max(differences) <= TOLERANCE * max(1.0, float(np.abs(wanted[0]).max())):
            raise ArithmeticError(f"The exported model's outputs differ from torch's by {max(differences):.3g}.")
        worst = max(worst, differences[0])
    return worst
