"""Where bfloat16 is multiplied by the hardware itself."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively: CUDA 8.0 and newer, CPUs with AVX-512 BF16 or AMX.

    Others emulate it, slower than they multiply float32. Never waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
