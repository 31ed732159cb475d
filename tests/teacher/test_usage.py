from __future__ import annotations

from pathlib import Path

from schemas.requests import Message, Reply, Sampling, TeacherRequest
from schemas.usage import Usage, total_usage
from teacher.journal import Journal, compact
from teacher.usage import row_costs
from tests.teacher.stored_replies import key_of

COUNTS = ("num_calls", "num_replies", "num_retries", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds")


def reply(choice: int, **changes: int) -> Reply:
    return Reply(
        "x",
        "stop",
        "m",
        prompt_tokens=100,
        completion_tokens=7,
        cached_tokens=60,
        seconds=0.5,
        choice=choice,
        **changes,
    )


def test_the_rows_of_all_journals_sum_to_what_their_replies_cost(tmp_path: Path) -> None:
    """Whether a journal is compacted makes no difference."""
    stored = [
        (0, "a", "performance", reply(0)),
        (1, "a", "performance", reply(1)),
        (2, "a", "performance", reply(0, num_attempts=3)),
        (3, "a", "routing", reply(0)),
        (4, "b", "routing", reply(0)),
    ]
    for number, sample_id, purpose, said in stored:
        stage = tmp_path / purpose / "shard"
        with Journal(stage) as journal:
            request = TeacherRequest(sample_id, purpose, (Message("user", "?"),), Sampling(), index=number)
            journal.append(key_of(number), request, said)
    compact(tmp_path / "performance" / "shard")
    rows = row_costs(tmp_path).collect().sort("sample_id", "purpose").to_dicts()
    assert [(row["sample_id"], row["purpose"], row["num_calls"], row["num_replies"]) for row in rows] == [
        ("a", "performance", 2, 3),
        ("a", "routing", 1, 1),
        ("b", "routing", 1, 1),
    ]
    assert (rows[0]["prompt_tokens"], rows[0]["completion_tokens"], rows[0]["num_retries"]) == (200, 21, 2)
    total = total_usage(Usage.of_stored(said) for *_, said in stored).to_record()
    assert {name: sum(row[name] for row in rows) for name in COUNTS} == {name: total[name] for name in COUNTS}
