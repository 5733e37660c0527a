"""Memory and processor in use, as the system tells it."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

MIB = 2**20


class Usage:
    """Reads memory and GPU utilization; what cannot be told is left out.

    Args:
        device: the device of this process.
        say: takes one line, once, where the GPU's utilization cannot be told.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self._device, self._say = device, say
        self._nvml = device.type == "cuda"

    def read(self) -> dict[str, float]:
        """Figures as they stand; never waits for the device."""
        figures = {"memory/host_mb": resident_bytes() / MIB}
        if self._device.type == "cuda":
            figures["memory/device_mb"] = torch.cuda.max_memory_allocated(self._device) / MIB
        if self._nvml:
            try:
                figures["gpu/utilization"] = float(torch.cuda.utilization(self._device))
            except Exception as error:  # NVML is optional: bindings, driver or permission may be missing
                self._nvml = False
                self._say(f"GPU utilization is not logged ({' '.join(f'{type(error).__name__}: {error}'.split())})")
        return figures


def resident_bytes() -> int:
    """Memory this process holds now."""
    return psutil.Process().memory_info().rss
