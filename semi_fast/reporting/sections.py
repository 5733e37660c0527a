"""The parts of a report, as plain values that the template prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from semi_fast.reporting.drawing import Figure


@dataclass
class Table:
    """Rows of text or numbers. numeric: columns set flush right. strong: rows to stand out. wide: whether it takes the
    page's whole width.
    kind: "facts" for pairs of a name and a value, which stand in columns where the table is wide.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numeric: Sequence[int] = ()
    strong: Sequence[int] = ()
    title: str = ""
    caption: str = ""
    wide: bool = False
    kind: str = ""


@dataclass
class Picture:
    """An image with what there is to say of it. src: a data URI. good: right, wrong, or unknown."""

    src: str
    lines: Sequence[str]
    good: bool | None = None


@dataclass
class Gallery:
    """Pictures under a heading; small ones stand closer and carry their text as a tooltip only."""

    title: str
    pictures: list[Picture]
    caption: str = ""
    small: bool = False


@dataclass
class Section:
    """A part of the page. missing: sentences about what cannot be shown, and why."""

    id: str
    title: str
    lead: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
