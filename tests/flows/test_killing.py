"""A short killing campaign (`python -m benchmarks.killing` is the long one), and that its ledger sees what it must."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cards import configuration
from benchmarks.killing import JOURNAL_POINTS, POINTS, CallLedger, SampleNames, renamed_kind, run_campaign
from schemas.config import RunConfig
from schemas.requests import Message, Reply, Sampling, TeacherRequest
from teacher.client import reply_key
from teacher.fault_server.answers import sha256_of_json
from teacher.journal import Journal

QUESTION = TeacherRequest("a" * 32, "performance", (Message("user", "Card 1?"),), Sampling(), seed=40)


def test_killed_runs_end_with_the_same_corpus_and_pay_for_no_durable_reply_again(tmp_path: Path) -> None:
    findings = run_campaign(tmp_path, num_kills=6, num_rows=30, seed=3, latency_seconds=0.03)
    assert findings.violations == []
    assert findings.different == []
    assert findings.kills.total() == 6 and findings.num_finished >= 1
    assert 0 < findings.kills["random"] < 6, "both kinds of kills"
    assert findings.num_believed > 0


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return configuration(tmp_path / "cards.jsonl", tmp_path / "work", "http://127.0.0.1:9/v1")


@pytest.fixture
def ledger(config: RunConfig, tmp_path: Path) -> CallLedger:
    return CallLedger(tmp_path / "calls.jsonl", config, SampleNames(config))


def log_call(tmp_path: Path, seed: int, n: int = 1) -> None:
    """Logs a call for n samples of the question, as the server does."""
    question = sha256_of_json([{"role": "user", "content": "Card 1?"}]).hex()
    call: dict[str, Any] = {"question": question, "seed": seed, "n": n, "purpose": "performance", "index": seed - 40}
    with (tmp_path / "calls.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def store(config: RunConfig, indices: Sequence[int]) -> None:
    """Makes the replies to samples of the question durable."""
    with Journal(Path(config.workdir) / "journals" / "performance" / "cards-00000") as journal:
        for index in indices:
            request = QUESTION.sample(index)
            journal.append(reply_key(request, config.teacher), request, Reply("1", "stop", "cards"))


def test_asking_again_for_a_durable_reply_is_a_violation(config: RunConfig, ledger: CallLedger, tmp_path: Path) -> None:
    log_call(tmp_path, 40)
    store(config, [0])
    ledger.note_end(was_killed=True)
    log_call(tmp_path, 40)
    ledger.note_end(was_killed=False)
    assert ledger.violations == ["performance, sample 0 was asked for again, although its reply was durable"]
    assert (ledger.num_repeated, ledger.num_in_flight) == (0, [0])


def test_asking_again_for_what_was_in_flight_is_counted(config: RunConfig, ledger: CallLedger, tmp_path: Path) -> None:
    log_call(tmp_path, 40, n=3)
    store(config, [0])
    ledger.note_end(was_killed=True)
    log_call(tmp_path, 41)
    log_call(tmp_path, 42)
    store(config, [1, 2])
    ledger.note_end(was_killed=False)
    assert ledger.violations == []
    assert (ledger.num_calls, ledger.num_samples, ledger.num_repeated, ledger.num_in_flight) == (3, 5, 2, [2])


def test_asking_twice_within_one_run_is_a_violation(ledger: CallLedger, tmp_path: Path) -> None:
    log_call(tmp_path, 40, n=2)
    log_call(tmp_path, 41)
    ledger.note_end(was_killed=False)
    assert ledger.violations == ["performance, sample 1 was asked for twice by one run"]


def test_a_durable_reply_that_vanishes_is_a_violation(config: RunConfig, ledger: CallLedger, tmp_path: Path) -> None:
    log_call(tmp_path, 40)
    store(config, [0])
    ledger.note_end(was_killed=True)
    next(Path(config.workdir).rglob("attempt-*")).unlink()
    ledger.note_end(was_killed=False)
    assert ledger.violations == ["a reply that was durable at a kill is gone"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("work/images/0ab/0ab1.img", "image"),
        ("work/stages/routing/cards-00001.json", "marker"),
        ("work/stages/routing/cards-00001.parquet", "rows"),
        ("work/stages/routing/cards-00001.fates.parquet", "rows"),
        ("work/stages/duplicates/cards-00001.features", "features"),
        ("work/stages/duplicates/published.json", "ledger"),
        ("work/corpus/.building/data/think/00000.parquet", "corpus"),
        ("work/corpus/.building/manifest.json", "manifest"),
        ("work/corpus/v0001", "version"),
        ("work/corpus/latest", "latest"),
        ("work/journals/routing/cards-00001/replies-00002-0000abcd.parquet", "other"),
    ],
)
def test_a_rename_is_named_by_what_it_puts_in_place(path: str, kind: str) -> None:
    assert renamed_kind(Path(path)) == kind
    assert kind == "other" or f"{kind}-before-rename" in POINTS.keys() - JOURNAL_POINTS.keys()
