"""The rows of a report's browser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from corpus.browser import FACETS, browser_rows, facet_name, facet_values
from corpus.excerpts import ShownFate, ShownReply, ShownRow
from corpus.report_inputs import ReportInputs
from corpus.tally import CorpusTally
from schemas.fates import Exit, Fate

ID = "a" * 32


def row(**changes: Any) -> ShownRow:
    names = dict.fromkeys(("licence", "teacher", "reasoner", "question", "answer", "evidence", "reasoning"), "x")
    values: dict[str, Any] = {"id": ID, "mode": "think", "topic": "math", "kind": "objective", "answer_type": "count"}
    values |= {"source": "charts", "origin": "charts:f#1", "choices": (), "reference": "7"}
    return ShownRow(**{**names, **values, **changes})


def fate(**changes: Any) -> ShownFate:
    values: dict[str, Any] = {"origin": "charts:f#2", "id": ID, "source": "charts", "stage": "duplicates"}
    values |= {"exit": Exit.DROPPED, "reason": "duplicate_near", "detail": "like another"}
    return ShownFate(Fate(**{**values, **changes}))


def rows_of(**values: Any) -> list[Any]:
    names = dict.fromkeys(("name", "version", "created", "recipe", "inputs", "teacher", "reasoner"), "x")
    return browser_rows(ReportInputs(**names, stages={}, tally=CorpusTally(), **values))


def test_rows_come_in_order_of_their_groups() -> None:
    fates = [fate(exit=Exit.QUARANTINED, origin="charts:f#9"), fate()]
    groups = [row.group for row in rows_of(rows=[row(mode="direct"), row()], fates=fates)]
    assert groups == ["think", "direct", "dropped", "quarantined"]


def test_a_row_is_linked_to_by_its_id_and_a_copy_of_it_by_another() -> None:
    anchors = [row.anchor for row in rows_of(rows=[row()], fates=[fate(), fate(id=None), fate(id='"><script>')])]
    assert anchors[:2] == [ID, f"{ID}-2"]
    assert all(anchor.startswith("row-") and anchor.isascii() for anchor in anchors[2:])
    assert len(set(anchors)) == 4


def test_verdicts_of_counted_replies_are_a_facet() -> None:
    wrong, right = (
        ShownReply("performance", 0, "", outcome="wrong"),
        ShownReply("performance", 1, "", outcome="correct"),
    )
    word = ShownReply("topic", 0, "", outcome="math")
    for replies, facet in [
        ([wrong, word], "all_wrong"),
        ([wrong, right], "mixed"),
        ([word], ""),
        ([wrong, replace(right, is_counted=False)], "all_wrong"),
    ]:
        assert rows_of(rows=[row()], replies={ID: replies})[0].facets["verdict"] == facet


def test_only_facets_that_tell_rows_apart_are_offered() -> None:
    rows = rows_of(rows=[row(), row(id="b" * 32, topic="ocr")], fates=[fate()])
    assert facet_values(rows) == {
        "group": [("think", "Thinking"), ("dropped", "Dropped")],
        "topic": [("math", "Math and K12"), ("ocr", "OCR")],
        "kind": [("objective", "objective")],
        "answer_type": [("count", "count")],
        "stage": [("duplicates", "duplicates")],
        "reason": [("duplicate_near", "duplicate near")],
    }
    assert set(rows[0].facets) == set(FACETS)


def test_facets_are_short_and_without_control_characters() -> None:
    facets = rows_of(rows=[row(source="\x1b[31m" + "long" * 1000)])[0].facets
    assert len(facets["source"]) <= 81 and "\x1b" not in facets["source"]
    assert facet_name("source", "a_b") == "a_b" and facet_name("reason", "a_b") == "a b"
