"""The README of an export: how to train on it with the tool it is for, and under which licences its rows are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corpus.card import escaped_name

if TYPE_CHECKING:
    from corpus.exports.export import Exported


def render_readme(exported: Exported, *, name: str, data: str) -> str:
    """Returns the page. name: of the data set, on command lines. data: its file or folder of rows."""
    environment = Environment(  # noqa: S701 - Markdown, not HTML; names from data are escaped as Markdown
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["name"] = escaped_name
    template = environment.get_template("readme.md.jinja")
    return template.render(export=exported, dataset=name, data=data).strip() + "\n"
