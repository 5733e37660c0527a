"""Kernels of numba.cuda on torch's tensors, devices and streams.

numba.cuda is imported when the first kernel is built and not before: it costs time, and fails where CUDA's libraries
are absent. A module of kernels therefore has `from numba import cuda` at its top (the simulator exchanges that global
while a kernel runs) and is itself imported inside a function, after `cuda()` has said what is missing.
With NUMBA_ENABLE_CUDASIM=1 in the environment the same calls run in numba's simulator, on CPU tensors.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import UserError

REMEDY = "Install it with: pip install -e '.[cuda]'"


@lru_cache(maxsize=1)
def cuda() -> ModuleType:
    """The module numba.cuda, imported at the first call.

    Raises: UserError where it is not installed or finds no CUDA libraries.
    """
    try:
        module = importlib.import_module("numba.cuda")
        dispatcher = importlib.import_module("numba.cuda.dispatcher")
    except Exception as error:  # numba-cuda raises classes of its own, by what is missing
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"The CUDA kernels need numba-cuda, whose import failed ({cause}). {REMEDY}") from error
    if not simulated():
        # A step's few hundred blocks are what there is to do; numba would warn at each launch.
        dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    return module


def simulated() -> bool:
    """Whether kernels run in numba's simulator."""
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def device_array(tensor: Tensor) -> Any:
    """What a kernel takes for this tensor: a view of the same memory, made without waiting for the device.

    bfloat16 is seen as uint16, the bits. Channels_last images are to be passed as their contiguous NHWC permutation.

    Args:
        tensor: on a CUDA device, whose context is current (as within `launch`); on the CPU in the simulator.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy() if simulated() else cuda().as_cuda_array(tensor, sync=False)


def launch(kernel: Any, grid: int, block: int, device: torch.device, *args: Any) -> None:
    """Queue a kernel on torch's current stream of `device`; returns before it has run.

    Args:
        kernel: what `cuda().jit` made.
        grid: blocks, 1 or more.
        block: threads a block.
        device: where the tensors are; the CPU in the simulator.
        args: tensors, which pass through `device_array`, and numbers, which numba takes as they are.
    """
    if simulated():
        kernel[grid, block](*_arrays(args))
        return
    with torch.cuda.device(device):
        stream = cuda().external_stream(torch.cuda.current_stream(device).cuda_stream)
        kernel[grid, block, stream](*_arrays(args))


def _arrays(args: tuple[Any, ...]) -> list[Any]:
    return [device_array(arg) if isinstance(arg, Tensor) else arg for arg in args]
