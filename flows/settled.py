"""What an earlier run decided and would decide again: rows whose labels need not be made anew from their replies.

Labels depend on the row, the settings and the stored replies alone, and what is stored stays. So where row and settings
are the same, the label is, if all that it rests on is stored. That is not so where a call failed: a failure is not
stored, and a curation would ask again. Each function here takes only rows of which it is certain; all others are
labelled by the functions of `flows.labelling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flows.stages import concerned_places
from judges import difficulty, performance, reasoning
from schemas.config import RunConfig
from schemas.samples import AnswerType, Kind
from schemas.usage import Ledger, Usage, UsageKey


@dataclass(frozen=True, slots=True)
class Earlier:
    """A stage over a shard as an earlier run left it.

    before: the rows it read. after: those it kept. usage: what their replies cost. is_same_recipe: its settings were
    those of now; of the stage `difficulty`, all but the threshold, of stages that verify answers, all but the
    verifier's. same_verdicts: answer types on which the verifier says what it said then. are_same_checks: what it
    accepted as a trace would be accepted now.
    """

    before: pa.Table
    after: pa.Table
    usage: Ledger
    is_same_recipe: bool
    are_same_checks: bool
    same_verdicts: frozenset[AnswerType] = frozenset(AnswerType)


@dataclass(frozen=True, slots=True)
class Settled:
    """Rows of a stage whose result is known, at their places in what it reads.

    usage: what their replies cost. is_all: usage is that of all rows which the stage looks at.
    """

    places: NDArray[np.int64]
    rows: pa.Table
    usage: Ledger
    is_all: bool


def settled_rows(
    stage: str,
    config: RunConfig,
    table: pa.Table,
    earlier: Earlier | None,
    read_stored: Callable[[], pa.Table | None],
) -> Settled | None:
    """Returns the rows of which the result is certain; None where there are none.

    table: what the stage reads. read_stored: `Journal.stored`, called only where whose replies there are must be known.
    Raises StorageError: as `read_stored`.
    """
    if earlier is None or not earlier.is_same_recipe:
        return None
    if stage == "difficulty":
        return _settled_verdicts(config, table, earlier)
    if stage == "performance" and earlier.same_verdicts == frozenset(AnswerType):
        return _settled_answers(table, earlier)
    if stage not in ("performance", "reasoning"):
        return None
    replies = read_stored()
    if replies is None:
        return None
    settled = _settled_traces if stage == "reasoning" else _settled_answers_of_types
    return settled(config, table, earlier, replies)


def _settled_verdicts(config: RunConfig, table: pa.Table, earlier: Earlier) -> Settled | None:
    """Holds the stored probabilities against the threshold. Of a panel, some members may have failed: not certain."""
    stage = "difficulty"
    places = concerned_places(stage, table)
    if config.difficulty.panel or not _are_same_rows(stage, table, places, earlier):
        return None
    after = earlier.after.take(pa.array(concerned_places(stage, earlier.after)))
    decided = [difficulty.decision_at(yes, config.difficulty) for yes in after["probability"].to_pylist()]
    modes = pa.array([str(decision.mode) for decision in decided], pa.string())
    decided_rows = _with_column(after, "mode", modes)
    return Settled(places[_places_of(after, table.take(pa.array(places)))], decided_rows, earlier.usage, is_all=True)


def _settled_answers(table: pa.Table, earlier: Earlier) -> Settled | None:
    """Takes labels whose every sample was scored: one that was not may have been a call that failed."""
    stage = "performance"
    places = concerned_places(stage, table)
    if not _are_same_rows(stage, table, places, earlier):
        return None
    after = earlier.after.take(pa.array(concerned_places(stage, earlier.after)))
    after = after.filter(pc.equal(after["num_scored"], after["num_sampled"]))
    return Settled(places[_places_of(after, table.take(pa.array(places)))], after, earlier.usage, is_all=True)


def _settled_answers_of_types(config: RunConfig, table: pa.Table, earlier: Earlier, stored: pa.Table) -> Settled | None:
    """Takes labels as `_settled_answers` does, of rows on which a changed verifier says what it said.

    Only of rows whose stored samples are those of one question, so that it is known what they cost.
    """
    settled = _settled_answers(table, earlier)
    if settled is None:
        return None
    is_certain = pc.is_in(settled.rows["answer_type"], pa.array(sorted(earlier.same_verdicts), pa.string()))
    is_certain = pc.and_(is_certain, _is_in(settled.rows["id"], _asked_in_turn(stored, performance.PURPOSE)))
    rows = settled.rows.filter(is_certain)
    places = settled.places[is_certain.to_numpy()]
    usage = _costs("performance", {performance.PURPOSE: config.teacher.model}, stored, rows)
    return Settled(places, rows, usage, is_all=len(places) == len(concerned_places("performance", table)))


def _settled_traces(config: RunConfig, table: pa.Table, earlier: Earlier, stored: pa.Table) -> Settled:
    """Takes traces that were accepted at the first try, and are the only one that is stored of their row.

    A trace of an open row was judged once, where that is asked for: two judgements may be those of two tries.
    """
    stage = "reasoning"
    places = concerned_places(stage, table)
    rows = table.take(pa.array(places))
    accepted = earlier.after.take(pa.array(concerned_places(stage, earlier.after)))
    found = pc.index_in(rows["id"], accepted["id"].combine_chunks())
    is_certain = pc.and_(pc.is_valid(found), _is_in(rows["id"], _asked_once(stored, reasoning.PURPOSE)))
    if config.reasoning.judge_consistency:
        is_judged = _is_in(rows["id"], _asked_once(stored, reasoning.CONSISTENCY))
        is_certain = pc.and_(is_certain, pc.or_(pc.equal(rows["kind"], str(Kind.OBJECTIVE)), is_judged))
    is_judged_alike = _is_in(rows["answer_type"], pa.array(sorted(earlier.same_verdicts), pa.string()))
    is_certain = pc.and_(is_certain, pc.or_(pc.equal(rows["kind"], str(Kind.SUBJECTIVE)), is_judged_alike))
    # The id stands for what was asked, not for what routing made of it.
    same = accepted.take(found.combine_chunks())
    for name in ("kind", "answer_type"):
        is_certain = pc.and_(is_certain, pc.fill_null(pc.equal(rows[name], same[name]), False))
    rows, same = rows.filter(is_certain), same.filter(is_certain)
    for name in ("reasoning", "final_answer"):
        rows = _with_column(rows, name, same[name])
    models = {reasoning.PURPOSE: config.reasoner_endpoint.model}
    if config.reasoning.judge_consistency:
        models[reasoning.CONSISTENCY] = config.teacher.model
    is_all = rows.num_rows == len(places)
    return Settled(places[is_certain.to_numpy()], rows, _costs(stage, models, stored, rows), is_all)


def _with_column(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    place = rows.schema.get_field_index(name)
    return rows.set_column(place, rows.schema.field(place), values)


def _are_same_rows(stage: str, table: pa.Table, places: NDArray[np.int64], earlier: Earlier) -> bool:
    before = earlier.before.take(pa.array(concerned_places(stage, earlier.before)))
    return bool(table.take(pa.array(places)).equals(before))


def _places_of(kept: pa.Table, rows: pa.Table) -> NDArray[np.int64]:
    """Returns the places of rows that were kept, which stand in the order in which they were read."""
    places: NDArray[np.int64] = pc.index_in(kept["origin"], rows["origin"].combine_chunks()).cast(pa.int64()).to_numpy()
    return places


def _asked_once(stored: pa.Table, purpose: str) -> pa.Array:
    """Returns the rows of which one reply to a question is stored, and that is the first."""
    counted = _counted(stored, purpose)
    is_only = pc.and_(pc.equal(counted["index_count"], 1), pc.equal(counted["index_max"], 0))
    return counted["sample_id"].filter(is_only).combine_chunks()


def _asked_in_turn(stored: pa.Table, purpose: str) -> pa.Array:
    """Returns the rows of which one sample after the other is stored, each once.

    Another question under the same purpose (at another temperature, say) would have a first sample, too.
    """
    counted = _counted(stored, purpose)
    is_once = pc.equal(counted["index_count"], counted["index_count_distinct"])
    is_in_turn = pc.equal(counted["index_count"], pc.add(counted["index_max"], 1))
    return counted["sample_id"].filter(pc.and_(is_once, is_in_turn)).combine_chunks()


def _counted(stored: pa.Table, purpose: str) -> pa.Table:
    asked = stored.filter(pc.equal(stored["purpose"], purpose)).select(["sample_id", "index"])
    counts = [("index", "count"), ("index", "count_distinct"), ("index", "max")]
    return asked.group_by("sample_id", use_threads=False).aggregate(counts)


def _is_in(ids: pa.ChunkedArray, known: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(ids, known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known)


def _costs(stage: str, models: Mapping[str, str], stored: pa.Table, rows: pa.Table) -> Ledger:
    """Returns what all stored replies about rows cost. models: who was asked, by purpose."""
    source = rows["source"][0].as_py() if rows.num_rows else ""
    replies = stored.filter(_is_in(stored["sample_id"], rows["id"]))
    ledger = {}
    for purpose, model in models.items():
        part = replies.filter(pc.equal(replies["purpose"], purpose))
        if part.num_rows:
            ledger[UsageKey(stage, purpose, source, model)] = _cost(part)
    return ledger


def _cost(replies: pa.Table) -> Usage:
    """Returns the sum of `Usage.of_stored` over replies that are columns."""
    firsts = replies.filter(pc.equal(replies["choice"], 0))

    def total(part: pa.Table, name: str) -> int | float:
        value: int | float = pc.sum(part[name], min_count=0).as_py()
        return value

    return Usage(
        num_calls=firsts.num_rows,
        num_replies=replies.num_rows,
        num_retries=int(total(firsts, "num_attempts")) - firsts.num_rows,
        prompt_tokens=int(total(firsts, "prompt_tokens")),
        completion_tokens=int(total(replies, "completion_tokens")),
        cached_tokens=int(total(firsts, "cached_tokens")),
        seconds=float(total(firsts, "seconds")),
    )
