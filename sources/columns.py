"""Which columns a source must have, and how a column path is followed into a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.config import SourceConfig
from schemas.errors import RowError, SourceError
from sources.conversations import CONVERSATION_COLUMNS, IMAGE_COLUMNS
from sources.json_rows import JsonRow

Row = dict[str, Any]
"""A raw row, as JSON or Arrow gives it."""

Required = tuple[str, tuple[str, ...]]
"""A setting in `columns`, with the column paths of which one is enough."""

_ABSENT = object()
_ROWS_LOOKED_AT = 20
_MAX_NAMES = 30


def is_conversation(source: SourceConfig) -> bool:
    """Whether question and answer come from the turns of a conversation."""
    return source.format == "conversations" or source.columns.conversations is not None


def mapped_columns(source: SourceConfig) -> list[Required]:
    """Returns the columns that must exist: each setting's name with the columns of which one is enough.

    Of a `conversations` source that names no columns, the usual names are tried; its images are optional.
    """
    columns = source.columns.model_dump(exclude_none=True)
    if is_conversation(source):
        del columns["question"]
    required: list[Required] = [(setting, (column,)) for setting, column in columns.items()]
    if is_conversation(source) and source.columns.conversations is None:
        required.append(("conversations", CONVERSATION_COLUMNS))
    return required


def top_level_columns(source: SourceConfig) -> list[str]:
    """Returns the top-level columns that may be read, for readers that can leave the others out."""
    paths = [path for _, alternatives in mapped_columns(source) for path in alternatives]
    if is_conversation(source):
        paths += IMAGE_COLUMNS
    return list(dict.fromkeys(name for path in paths for name in (path, path.partition(".")[0])))


def look_up(row: Row, path: str | None) -> Any:
    """Returns the value at a column path; None if any part of it is absent.

    A column whose name is the whole path wins; else each dot reaches into a field, or by number into a list.
    """
    value = None if path is None else _find(row, path)
    return None if value is _ABSENT else value


def _find(row: Row, path: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        if isinstance(value, dict):
            value = value.get(name, _ABSENT)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _ABSENT
    return value


class ColumnWatch:
    """Watches JSON rows go by for mapped columns, since only the rows can tell which columns there are."""

    def __init__(self, source: str, where: str, required: list[Required]) -> None:
        self._source = source
        self._where = where
        self._unseen = required
        self._names: dict[str, None] = {}
        self._num_rows = 0
        self._has_objects = False

    def observe(self, row: JsonRow) -> None:
        """Notes which columns a row has. Rows are parsed only at the start and where a missing name occurs."""
        self._num_rows += 1
        if not self._unseen or row.content is None:
            return
        if self._num_rows > _ROWS_LOOKED_AT and self._has_objects and not self._may_have(row.content):
            return
        try:
            parsed = row.parse()
        except RowError:
            return
        self._has_objects = True
        self._names.update(dict.fromkeys(list(parsed)[:_MAX_NAMES]))
        self._unseen = [
            (setting, paths) for setting, paths in self._unseen if all(_find(parsed, path) is _ABSENT for path in paths)
        ]

    def _may_have(self, content: bytes) -> bool:
        names = [path.rpartition(".")[2] for _, paths in self._unseen for path in paths]
        return any(not name.isascii() or name.encode() in content for name in names)

    def check(self) -> None:
        """Raises SourceError: if no row had a mapped column. Rows that are no objects tell nothing of columns."""
        if self._unseen and self._has_objects:
            setting, paths = self._unseen[0]
            raise missing_column(self._source, self._where, setting, paths, list(self._names))


def missing_column(
    source: str, where: str, setting: str, paths: tuple[str, ...], present: Sequence[str]
) -> SourceError:
    """Returns the error that names the mapped column, the columns present and the setting to correct."""
    shown = ", ".join(map(repr, present[:_MAX_NAMES])) or "(none)"
    more = f" and {len(present) - _MAX_NAMES} more" if len(present) > _MAX_NAMES else ""
    wanted = " or ".join(map(repr, paths))
    return SourceError(
        f"source {source}: {where} has no column {wanted}; its columns are {shown}{more}. "
        f"Name the right one in `columns.{setting}`"
    )
