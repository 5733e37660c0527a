"""What a method asks of its parameters' learning rates."""

from __future__ import annotations

from typing import NamedTuple


class ParamGroup(NamedTuple):
    """Parameters by the prefix of their names; of several prefixes that match, the longest counts."""

    prefix: str  # "net" or "heads.standard"
    factor: float = 1.0  # on the run's learning rate
    frozen: bool = False  # neither trained nor, for BatchNorm, updated
