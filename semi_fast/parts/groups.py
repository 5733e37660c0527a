"""Groups of parameters that a method trains differently from the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from data_prep.errors import UserError


def require_trained(net: nn.Module, remedy: str) -> None:
    """Raises: UserError with that remedy where a network is as initialized, as its BatchNorms tell."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if norms and not any(bool(norm.running_mean.any()) for norm in norms if norm.running_mean is not None):
        raise UserError(f"A classifier is to be trained on a finished network, got one that never trained. {remedy}")


class ParamGroup(NamedTuple):
    """The parameters of the module of that name; of several groups that hold one, the longest prefix counts."""

    prefix: str  # a module's dotted name within the method ("net", "heads.balanced"); "": all
    factor: float = 1.0  # on the learning rate
    frozen: bool = False  # not trained


def group_of(name: str, groups: Sequence[ParamGroup]) -> ParamGroup | None:
    """The group that the parameter of that dotted name is in."""
    holding = [g for g in groups if not g.prefix or name == g.prefix or name.startswith(g.prefix + ".")]
    return max(holding, key=lambda group: len(group.prefix), default=None)


def combined(first: Sequence[ParamGroup], second: Sequence[ParamGroup], names: Iterable[str]) -> tuple[ParamGroup, ...]:
    """Both at once: factors are multiplied, and what either freezes is frozen.

    Args:
        names: of all parameters; a group that would hold none of them is left out.
    """
    if not first or not second:
        return tuple(first or second)
    groups = []
    for prefix in dict.fromkeys(group.prefix for group in (*first, *second)):
        both = [group for group in (group_of(prefix, first), group_of(prefix, second)) if group is not None]
        factor, frozen = math.prod(group.factor for group in both), any(group.frozen for group in both)
        groups.append(ParamGroup(prefix, factor, frozen))
    used = {group_of(name, groups) for name in names}
    return tuple(group for group in groups if group in used)
