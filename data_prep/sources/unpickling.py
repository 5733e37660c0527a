"""Reading the pickled archives of old data sets without executing anything they say."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

# The stand-ins below are all that a pickle can reach. None of NumPy's own classes is among them: their state setters
# are written for trusted input.


class _RefusedError(pickle.UnpicklingError):
    """What a pickle asks for and does not get; pickle raises its own base class for damaged bytes."""


_NUMBERS = ("u1", "u2", "u4", "i1", "i2", "i4", "i8", "f4", "f8")


class _Dtype:
    """Stands in for numpy.dtype: a plain number type."""

    def __init__(self, name: str, *_: object) -> None:
        if not isinstance(name, str) or name.strip("<>|=") not in _NUMBERS:
            raise _RefusedError(f"an array of dtype {name!r}")
        self.code, self.order = name.strip("<>|="), "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise _RefusedError("an odd byte order")
        self.order = str(state[1])


class _Array:
    """Stands in for numpy.ndarray: keeps the state, from which `array` makes a real one."""

    array: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        plain = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not plain or not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise _RefusedError("an array of an odd kind")
        kind = np.dtype(dtype.order + dtype.code)
        if math.prod(shape) * kind.itemsize != len(data):
            raise _RefusedError(f"an array of shape {shape} with {len(data)} bytes")
        self.array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _Array:
        raise _RefusedError("an array of an odd kind")
    return _Array()


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Stands in for _codecs.encode, with which Python 3 pickles bytes at protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError(f"codec {encoding!r}")
    return text.encode("latin1")


_ADMITTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        raise _RefusedError("a persistent object")


def load_plain(data: bytes, where: str) -> dict[str, Any]:
    """Unpickle a dictionary of numbers, texts, lists and numeric arrays; Python 2's byte strings become text (latin-1).

    Nothing but those can be made: every other class or function that the pickle names is refused before it is looked
    up.

    Raises: UserError naming `where` and what was refused, or that it is damaged or no such pickle.
    """
    try:
        loaded = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _RefusedError as error:
        raise UserError(
            f"{where} is refused: its pickle asks for {error}, which the format does not need. "
            "Take the official archive."
        ) from None
    except Exception as error:  # damaged bytes raise nearly anything from within pickle
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        raise UserError(f"{where} is damaged ({reason}). Download it again.") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{where} holds no dictionary but {type(loaded).__name__}. Take the official archive.")
    return {_text(key): getattr(value, "array", value) for key, value in loaded.items()}


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
