"""Kernels of numba.cuda on torch's tensors, devices and streams.

numba.cuda is imported when the first kernel is built and not before: it costs time, and fails where CUDA's libraries
are absent. A module of kernels therefore has `from numba import cuda` at its top (the simulator exchanges that global
while a kernel runs) and is itself imported inside a function, after `cuda()` has said what is missing.
With NUMBA_ENABLE_CUDASIM=1 in the environment the same calls run in numba's simulator, on CPU tensors.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from data_prep.errors import UserError

REMEDY = "Install it with: pip install -e '.[cuda]'"

_arrays_of: Any = WeakTensorKeyDictionary()  # tensor -> what it was when it was wrapped, and its array
_copies_of: Any = WeakTensorKeyDictionary()  # tensor -> its version when it was copied, and copies by device


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


def kept_array(tensor: Tensor, *, flat: bool = False) -> Any:
    """`device_array` of a tensor that launch after launch takes: made once, and anew where its memory is another.

    Args:
        tensor: as for `device_array`.
        flat: of its elements in one row.
    """
    now = (tensor.data_ptr(), tensor.shape, tensor.stride(), flat)
    then, array = _arrays_of.get(tensor, (None, None))
    if then != now:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            # Of an alias: an array holds on to what it was made of, and must not hold the key of its own entry.
            array = device_array(tensor.detach().reshape(-1) if flat else tensor)
        _arrays_of[tensor] = now, array
    return array


def kept_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor's copy on a device, made once, and anew where torch wrote to the tensor in the meantime."""
    version, copies = _copies_of.get(tensor, (None, {}))
    if version != tensor._version:
        version, copies = tensor._version, {}
        _copies_of[tensor] = version, copies
    if device not in copies:
        copies[device] = tensor.to(device, copy=True)
    copy: Tensor = copies[device]
    return copy


def sources_version(*modules: Any) -> int:
    """A number that is another one where the source of a module or the compiler is, within 0..2^60 - 1.

    numba's cache of compiled kernels looks at the file of the kernel alone. This number, a closure variable of the
    kernel and so part of the key, stands for all other files that are compiled into it.
    """
    texts = [inspect.getsource(module) for module in modules]
    compilers = [str(importlib.import_module(name).__version__) for name in ("numba", "numba_cuda") if find_spec(name)]
    return int(hashlib.sha256("\n".join([*texts, *compilers]).encode()).hexdigest()[:15], 16)


def jit_cached(kernel: Any, **options: Any) -> Any:
    """`cuda().jit` of a kernel, kept on disk from process to process; its closure says what it was made of."""
    if simulated():
        return cuda().jit(kernel)
    try:
        return cuda().jit(cache=True, **options)(kernel)
    except RuntimeError:  # numba finds no folder it may write to
        return cuda().jit(**options)(kernel)


@lru_cache
def fault(device: torch.device) -> str | None:
    """Why no kernel runs on a CUDA device, in one line, or None: an empty one is launched and waited for, once."""
    try:
        launch(cuda().jit(_do_nothing), 1, 1, device)
        torch.cuda.synchronize(device)
    except UserError as error:
        return str(error)
    except Exception as error:  # of numba, the compiler or the driver, each of which has its own classes
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"numba-cuda cannot launch a kernel ({cause})"
    return None


def require(device: torch.device) -> None:
    """Raises: UserError where no kernel runs on a CUDA device."""
    problem = fault(device)
    if problem is not None:
        raise UserError(problem)


def _do_nothing():
    return


def launch(kernel: Any, grid: int, block: int, device: torch.device, *args: Any) -> None:
    """Queue a kernel on torch's current stream of `device`; returns before it has run.

    Args:
        kernel: what `cuda().jit` made.
        grid: blocks, 1 or more.
        block: threads a block.
        device: where the tensors are; the CPU in the simulator.
        args: tensors, which pass through `device_array`; what that or `kept_array` made; and numbers, which numba takes
            as they are.
    """
    if simulated():
        kernel[grid, block](*_arrays(args))
        return
    with torch.cuda.device(device):
        stream = _stream(device, torch.cuda.current_stream(device).cuda_stream)
        kernel[grid, block, stream](*_arrays(args))


@lru_cache(maxsize=64)
def _stream(device: torch.device, address: int) -> Any:
    """numba's stream for one of torch's, within its device's context; the same object lets numba find the launch."""
    return cuda().external_stream(address)


def _arrays(args: tuple[Any, ...]) -> list[Any]:
    return [device_array(arg) if isinstance(arg, Tensor) else arg for arg in args]
