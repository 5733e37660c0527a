"""Training methods: the file's name is the method's name on the command line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from data_prep.errors import UserError, unknown
from pipelines.batch import Info
from semi_fast.methods.base import Context, Look, Method, Out

__all__ = ["Context", "Look", "Method", "Out", "build_method", "check_options", "method_class", "method_names"]

STRICT = ConfigDict(strict=True, allow_inf_nan=False)  # an int passes as a float; "1", True and 1.0 not as an int


def method_names() -> list[str]:
    """The methods there are: one a file of this folder, but for ``base``."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def method_class(name: str) -> type[Method]:
    """The method of that name: the subclass of Method that ``semi_fast/methods/<name>.py`` defines.

    Raises: UserError for a name that no file has; it names the nearest one.
    """
    names = method_names()
    if name not in names:
        raise unknown("method", name, names)
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    methods = [c for c in classes if issubclass(c, Method)]
    if len(methods) != 1:
        raise TypeError(f"{module.__file__} must define one subclass of Method, got {[c.__name__ for c in methods]}.")
    return methods[0]


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of method ``name``: those given, checked, and the defaults of the others.

    The keyword-only arguments of the method's constructor are the schema; their annotations carry type and range.

    Raises: UserError for an unknown method or option (it names the nearest one), a wrong type or a value out of range.
    """
    cls = method_class(name)
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if untyped := [key for key in known if key not in hints]:
        raise TypeError(f"Options of method '{name}' need a type: {', '.join(untyped)}.")
    for key, value in options.items():
        if key not in known:
            raise unknown(f"option of method '{name}'", key, known)
        known[key] = _checked(f"method.{key}", value, hints[key], known[key])
    return known


def _checked(key: str, value: Any, annotation: Any, default: Any) -> Any:
    try:
        return TypeAdapter(annotation, config=STRICT).validate_python(value)
    except ValidationError as error:
        rule = error.errors()[0]["msg"]
        raise UserError(f"{key}: {rule[0].lower()}{rule[1:]}, got {value!r}. The default is {default!r}.") from None


def build_method(name: str, net: nn.Module, info: Info, **options: Any) -> Method:
    """The method ``name`` around a network.

    Args:
        name: a file of this folder ("supervised", "fixmatch", "semi").
        net: images (n, 3, H, W) -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        options: keyword-only arguments of the method's constructor.

    Raises: UserError as ``check_options``.
    """
    method = method_class(name)(net, info, **check_options(name, options))
    predictions = method.corrected({head: torch.zeros(1, info.num_classes) for head in method.heads})
    for rule, holds, got in (
        (
            f"reported must be one of {list(predictions)}",
            method.reported in predictions,
            method.reported,
        ),
        ("weights must be averaged or raw", method.weights in ("averaged", "raw"), method.weights),
        ("streams must hold one named labeled", "labeled" in method.streams, list(method.streams)),
    ):
        if not holds:
            raise TypeError(f"Method '{name}': {rule}, got {got!r}.")
    return method
