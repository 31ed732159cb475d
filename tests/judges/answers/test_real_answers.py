"""Our verdicts on recorded answers of real models, against a benchmark's own marks, and on real references.

`mathvision_disagreements.jsonl` lists every recorded answer of MATH-Vision's testmini on which we and the benchmark's
marks differ, with a word on who is right. `index` counts the 15 answers of a problem from 0.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from judges.answers import VerifierPool, infer_answer_type, reference_problem, verify
from schemas.config import VerificationConfig
from schemas.samples import AnswerType, Sample
from schemas.verdicts import Failure, Outcome, Verdict

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
LISTED = Path(__file__).with_name("mathvision_disagreements.jsonl")
CONFIG = VerificationConfig()


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        pytest.skip(f"REAL DATA NOT TESTED: {path} does not stand beside this checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sample(problem: dict[str, Any]) -> Sample:
    choices = tuple(problem["options"])
    return Sample(
        id=problem["id"],
        source="mathvision",
        origin=f"mathvision:{problem['id']}",
        question=problem["question"],
        choices=choices,
        answer=problem["answer"],
        answer_type=infer_answer_type(problem["answer"], choices, problem["question"]),
    )


Key = tuple[str, int]


@pytest.fixture(scope="module")
def judged() -> dict[Key, tuple[bool, Verdict]]:
    """Returns by problem and index the benchmark's mark and our verdict."""
    samples = {problem["id"]: _sample(problem) for problem in _lines(DATA / "mathvision" / "problems.jsonl")}
    answers = [
        ((row["id"], index), answer)
        for row in _lines(DATA / "mathvision" / "responses.jsonl")
        for index, answer in enumerate(row["responses"])
    ]
    with VerifierPool(CONFIG) as pool:
        verdicts = pool.verify_many([(answer["response"], samples[key[0]], False) for key, answer in answers])
    return {key: (bool(answer["correct"]), verdict) for (key, answer), verdict in zip(answers, verdicts, strict=True)}


def listed() -> dict[Key, dict[str, Any]]:
    return {(row["id"], row["index"]): row for row in map(json.loads, LISTED.read_text(encoding="utf-8").splitlines())}


def test_every_disagreement_with_mathvision_is_listed_and_no_other(judged: dict[Key, tuple[bool, Verdict]]) -> None:
    assert len(judged) == 4560
    found = {key for key, (mark, verdict) in judged.items() if mark != verdict.is_correct}
    assert found == set(listed())


def test_ours_is_wrong_on_no_more_than_allowed(judged: dict[Key, tuple[bool, Verdict]]) -> None:
    ours_wrong = [key for key, row in listed().items() if not row["who_is_right"].startswith("ours")]
    marked_right = [key for key, (mark, _) in judged.items() if mark]
    assert len([key for key in ours_wrong if judged[key][0]]) <= 0.01 * len(marked_right)
    assert len(ours_wrong) <= 0.002 * len(judged)
    # Even if each reply marked right that we do not call correct were our mistake, the first limit would hold.
    assert len([key for key in marked_right if not judged[key][1].is_correct]) <= 0.01 * len(marked_right)


def test_hardly_any_answer_is_unscored(judged: dict[Key, tuple[bool, Verdict]]) -> None:
    unscored = {key: verdict.failure for key, (_, verdict) in judged.items() if not verdict.is_scored}
    assert unscored == {("951", 7): Failure.UNREADABLE, ("951", 8): Failure.UNREADABLE}  # both are "\boxed{?}"


@pytest.mark.parametrize("eight", [range(8), range(7, 15), (2, 3, 4, 5, 6, 7, 9, 11)])
def test_labels_of_eight_answers_are_the_benchmarks_but_for_listed_disagreements(
    judged: dict[Key, tuple[bool, Verdict]], eight: range | tuple[int, ...]
) -> None:
    disputed = {key[0] for key in listed() if key[1] in eight}
    for problem in {key[0] for key in judged} - disputed:
        answers = [judged[problem, index] for index in eight]
        benchmark_label = not any(mark for mark, _ in answers)
        our_label = all(verdict.outcome is Outcome.WRONG for _, verdict in answers)
        assert our_label == benchmark_label, problem


def test_gsm8k_references_are_right_as_themselves_and_reformatted() -> None:
    for number, row in enumerate(_lines(DATA / "gsm8k" / "train-1000.jsonl")):
        answer = row["answer"].rpartition("####")[2].strip()
        of = Sample(str(number), "gsm8k", f"gsm8k:{number}", row["question"], answer=answer)
        of = replace(of, answer_type=infer_answer_type(answer, (), of.question))
        assert of.answer_type in (AnswerType.NUMBER, AnswerType.COUNT)
        assert reference_problem(of) is None
        value = int(answer.replace(",", ""))
        right = [answer, f"\\boxed{{{value:,}}}", row["answer"]]
        wrong = [f"{value} or {value + 1}"]
        if number % 4 == 0:
            right += [f"**Answer:** ${value}$.", f"So it is {value}.0"]
            wrong += [str(value + 1), f"{value}0" if value else "10", f"-{value + 1}"]
        assert [verify(reply, of, CONFIG).outcome for reply in right] == [Outcome.CORRECT] * len(right), row
        assert [verify(reply, of, CONFIG).outcome for reply in wrong] == [Outcome.WRONG] * len(wrong), row


def test_gsm8k_worked_solutions_without_the_marker_are_read_from_their_last_line() -> None:
    verdicts = []
    for number, row in enumerate(_lines(DATA / "gsm8k" / "train-1000.jsonl")[::2]):
        steps, _, answer = (part.strip() for part in row["answer"].rpartition("####"))
        of = Sample(
            str(number), "gsm8k", f"gsm8k:{number}", row["question"], answer=answer, answer_type=AnswerType.NUMBER
        )
        verdicts.append(verify(steps, of, CONFIG))
    assert sum(verdict.is_correct for verdict in verdicts) >= 0.97 * len(verdicts)
    assert sum(verdict.outcome is Outcome.WRONG for verdict in verdicts) <= 0.015 * len(
        verdicts
    )  # last lines on something else
