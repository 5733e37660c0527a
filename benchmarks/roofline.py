"""A SeMi step on paper: floating-point operations and bytes of every operation, and what an H100 could make of them.

    python -m benchmarks.roofline            one JSON line
    python -m benchmarks.roofline --table    as Markdown

Nothing is computed: the step runs on tensors without memory (PyTorch's fake tensors) under bf16 autocast, and each
operation is weighed by its shapes: operations by torch.utils.flop_counter, bytes as all that it reads and writes. An
operation takes no less than the larger of operations / peak and bytes / bandwidth; `separate_ms` is the sum over all
of them (each one a kernel of its own, as without compilation), `fused_ms` that over convolutions and matrix products
alone (everything else fused into them at no cost). No real step is faster than the second.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import is_launched, report
from pipelines.batch import Batch, Info, Sizes
from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import Context, build_method
from semi_fast.nets import build_net
from semi_fast.training.ema import Ema
from semi_fast.training.optim import build_optimizer

# NVIDIA H100 SXM5, data sheet: bf16 tensor cores without sparsity, HBM3.
PEAK, BANDWIDTH = 989.4e12, 3.35e12  # operations/s, bytes/s
LAUNCH = 5e-6  # seconds of the host for one operation that is not compiled: a usual figure, not from the data sheet
LABELED, MU, STRONG = 64, 1, 2
CASES = (("wrn28_2", 32, 10), ("resnet50", 64, 127))  # network, side in pixels, K


class Weight(NamedTuple):
    """One operation: floating-point operations, bytes read and written."""

    flops: int
    bytes: int


class Weigh(TorchDispatchMode):
    """Weighs every operation that touches memory; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Weight] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if is_launched(func):
            count = flop_registry.get(packet)
            flops = int(count(*args, **kwargs, out_val=out)) if count else 0
            # An in-place result is among the arguments too: read once, written once.
            self.found.append(Weight(flops, size_of((args, kwargs)) + size_of(out)))
        return out


def take_memory(model: nn.Module, fake: FakeTensorMode) -> None:
    """Put tensors without memory in place of all parameters and buffers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake.from_tensor(buffer)


def size_of(values: Any) -> int:
    """Bytes of all tensors in nested values."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def weigh(net: str, side: int, classes: int) -> dict[str, object]:
    """The figures of one step."""
    info = Info(
        name="paper", num_classes=classes, class_names=tuple(map(str, range(classes))), resolution=side,
        labeled_counts=(100,) * classes, mean=(0.5,) * 3, std=(0.25,) * 3,
        num_train=1000 * classes, num_labeled=100 * classes, num_unlabeled=1000 * classes, num_test=classes,
        fingerprint="",
    )  # fmt: skip
    method = build_method(
        "semi", build_net(net, bn_momentum=0.001, raw_transitions=False), info, warmup_epochs=0, strong_views=STRONG
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        take_memory(method, fake)
        offered: list[int] = []
        width = method.bank.sums.shape[1]
        # The kernel takes addresses, which these tensors have none of; its bytes are counted below.
        method.bank.push = lambda candidates, *rest: offered.append(candidates.shape[0])
        optim, ema = build_optimizer(method, OptimSettings()), Ema(method, EmaSettings())

        sizes = Sizes(method.streams, LABELED, MU, 1)
        images = torch.empty(sizes.images_per_step, 3, side, side, dtype=torch.bfloat16)
        batch = Batch(
            images.contiguous(memory_format=torch.channels_last),
            sizes.groups,
            {"labeled": torch.zeros(LABELED, dtype=torch.int64)},
            {name: torch.zeros(sizes.of(name), dtype=torch.int64) for name in method.streams},
        )
        inputs = method.inputs(batch, Context.at(1000, 250_000))
        with Weigh() as model:
            with torch.autocast("cpu", torch.bfloat16):
                out = method(batch, inputs, ema.method.net)
            out.loss.backward()
        with Weigh() as update:
            optim.step()
            ema.update()
    parameters = sum(p.numel() for p in method.parameters())
    total = sizes.images_per_step
    heavy = [w for w in model.found if w.flops]
    flops = sum(w.flops for w in model.found)
    pixels = total * side * side * 3
    extra = {
        # SGD reads weight, gradient and momentum and writes two of them; the EMA reads two and writes one.
        "optimizer_ema": parameters * 4 * (5 + 3),
        "pipeline": pixels * (1 + 2),  # uint8 read, bf16 written
        # Of a candidate: itself, the entry it replaces read, and written; sums of all classes read and written.
        "bank": offered[0] * width * 4 * 3 + classes * width * 4 * 2,
    }
    separate = sum(roof(w) for w in model.found)
    return {
        "net": net,
        "side": side,
        "images": total,
        "parameters": parameters,
        "tflop": round(flops / 1e12, 4),
        "gbytes_separate": round(sum(w.bytes for w in model.found) / 1e9, 3),
        "gbytes_fused": round(sum(w.bytes for w in heavy) / 1e9, 3),
        "intensity_fused": round(flops / sum(w.bytes for w in heavy), 1),
        "operations": len(model.found) + len(update.found),
        "arithmetic_ms": round(1e3 * flops / PEAK, 3),
        "separate_ms": round(1e3 * separate, 3),
        "fused_ms": round(1e3 * sum(roof(w) for w in heavy), 3),
        "launches_ms": round(1e3 * LAUNCH * (len(model.found) + len(update.found)), 2),
        **{f"{name}_mbytes": round(count / 1e6, 2) for name, count in extra.items()},
        **{f"{name}_us": round(1e6 * count / BANDWIDTH, 2) for name, count in extra.items()},
    }


def roof(weight: Weight) -> float:
    """The least time of an operation, in seconds."""
    return max(weight.flops / PEAK, weight.bytes / BANDWIDTH)


def table(cases: list[dict[str, object]]) -> str:
    """The figures side by side, as Markdown."""
    heads = [f"{case['net']}, {case['side']} px" for case in cases]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(cases)]
    keys = [key for key in cases[0] if key not in ("net", "side")]
    return "\n".join([*lines, *(f"| `{key}` | {' | '.join(f'{case[key]:,}' for case in cases)} |" for key in keys)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print Markdown")
    arguments = parser.parse_args()
    cases = [weigh(*case) for case in CASES]
    if arguments.table:
        print(table(cases))
        return
    report("roofline", device="H100 SXM5, on paper", peak=PEAK, bandwidth=BANDWIDTH, nets=cases)


if __name__ == "__main__":
    main()
