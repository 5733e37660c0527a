"""A report as one HTML file with everything inside it, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import replacing
from semi_fast.reporting.drawing import Figure

HERE = Path(__file__).parent
EMPTY: Any = {"tiles": (), "facts": (), "settings": ()}  # what a page may lack


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


def write_page(path: Path, *, title: str, sections: Sequence[Section], **values: Any) -> Path:
    """Write the page to `path`, and its figures as SVG, PNG and CSV to the folder of the same name without suffix.

    Args:
        path: of the HTML file. title: of the page. sections: its parts; empty ones are left out.
        values: what else the template prints: `tiles`, `state`, `subtitle`, `notes`, `facts`, `settings`.

    Raises: OSError when it cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = lambda drawn: Markup(drawn.svg)  # our own SVG: its text is escaped by matplotlib
    style = Markup((HERE / "page.css").read_text())
    shown = [s for s in sections if s.figures or s.tables or s.galleries or s.missing]
    folder = path.with_suffix("")
    html = environment.get_template("page.html.j2").render(
        title=title, style=style, sections=shown, folder=folder.name, **{**EMPTY, **values}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for section in shown:
        for figure in section.figures:
            for suffix, content in figure.files.items():
                with replacing(folder / f"{figure.name}.{suffix}") as file:
                    file.write(content)
    with replacing(path) as file:
        file.write(html.encode("utf-8", "replace"))
    return path
