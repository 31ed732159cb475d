"""What becomes of a raw row: what is built from it, or the fate that says why nothing could be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from schemas.errors import BimodeError, RowError
from schemas.fates import Exit, Fate
from sources.columns import Row
from sources.rows import Draft
from sources.text import clean_text

MAX_FATE_CHARS = 500

Built = TypeVar("Built")


def row_outcome(
    row: Row | RowError, build: Callable[[Row, Draft], Built], *, source: str, origin: str, stage: str
) -> Built | Fate:
    """Returns what `build` makes of a row, or a quarantined fate with the reason; no row is lost, none ends the run.

    row: an error where the reader could not even make one of it. build: fills the draft on the way.

    Raises BimodeError: what `build` raises of them concerns the run, not the row.
    """
    draft = Draft()
    try:
        if isinstance(row, RowError):
            raise row
        return build(row, draft)
    except BimodeError:
        raise
    except RowError as error:
        return _fate(error, draft, source=source, origin=origin, stage=stage)
    except Exception as error:  # noqa: BLE001 - one odd row must not end the run; its fate records the error
        unforeseen = RowError("row_unreadable", f"{type(error).__name__}: {error}")
        return _fate(unforeseen, draft, source=source, origin=origin, stage=stage)


def storable(text: str) -> str:
    """Returns text that Arrow can store: file names may hold bytes that are not UTF-8."""
    return clean_text(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _fate(error: RowError, draft: Draft, *, source: str, origin: str, stage: str) -> Fate:
    return Fate(
        origin=origin,
        id=None,
        source=source,
        stage=stage,
        exit=Exit.QUARANTINED,
        reason=error.reason,
        detail=storable(error.detail)[:MAX_FATE_CHARS],
        question=storable(draft.question[: 2 * MAX_FATE_CHARS])[:MAX_FATE_CHARS],
        images=tuple(image.sha256 for image in draft.images),
    )
