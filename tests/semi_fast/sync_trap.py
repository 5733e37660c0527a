"""A dispatch trap: fails on every operation that would make the host wait for a device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,  # item(), float(), bool(), int(), if tensor:
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.equal,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,  # by a tensor of counts
}

INDEXING = {aten.index, aten.index_put, aten.index_put_}  # by a mask it depends on data, by numbers it does not
DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class SyncTrap(TorchDispatchMode):
    """Raises AssertionError inside the block.

    A device need not be there: the operations are the same on the CPU, all but copies to the host, which a run on
    PyTorch's "meta" device catches.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in WAITS or (packet not in INDEXING and DEPENDS & set(func.tags)):
            raise AssertionError(f"{func} waits for the device")
        if packet in INDEXING and any(
            index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        ):
            raise AssertionError(f"{func} with a mask has a shape that depends on data")
        if packet is aten._to_copy and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type:
            raise AssertionError(f"{func} copies between devices")
        return func(*args, **kwargs)
