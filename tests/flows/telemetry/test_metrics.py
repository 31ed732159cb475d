from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.cards import configuration
from flows.runtime import Runtime
from flows.runtime_view import EndpointView, RuntimeView
from flows.stages import STAGES
from flows.telemetry.endpoint import served
from flows.telemetry.last_run import last_run_path, write_last_run
from flows.telemetry.metrics import MAX_REASONS, MAX_SOURCES, OTHER, RunBooks, StageBook, registry_of
from flows.telemetry.settings import TelemetrySettings
from schemas.fates import StageCount
from schemas.usage import Usage, UsageKey, total_usage
from tests.flows.telemetry.watched_world import RUN, Sample, Seen, parsed, scrape, value_of


def shown(books: RunBooks) -> dict[Sample, float]:
    return parsed(generate_latest(registry_of(books)).decode())


def since_the_start(seen: Seen, name: str, **labels: str) -> float:
    """Returns how much a counter of this process grew during the run, which began after the first scrape's stage."""
    first = {key: value for key, value in seen.scrapes[0].items() if key[0] == name}
    before = value_of(first, name, **labels) if any(labels.items() <= dict(key[1]).items() for key in first) else 0.0
    return value_of(seen.scrapes[-1], name, **labels) - before


def test_at_the_end_rows_are_those_that_the_run_counted(seen: Seen) -> None:
    stages = [stage for stage in STAGES if stage != "decontamination"]
    for stage in stages:
        markers = [seen.workspace.read_marker(stage, shard) for shard in ("cards-00000", "cards-00001")]
        count = sum((marker.count for marker in markers if marker), StageCount())
        assert count.num_in > 50, stage
        labels = {"stage": stage}
        assert value_of(seen.scrapes[-1], "bimode_rows_total", outcome="kept", **labels) == count.num_kept
        for outcome, reasons in (("dropped", count.dropped), ("quarantined", count.quarantined)):
            for reason, number in reasons.items():
                shown = value_of(seen.scrapes[-1], "bimode_rows_total", outcome=outcome, reason=reason, **labels)
                assert shown == number
        assert value_of(seen.scrapes[-1], "bimode_rows_total", **labels) == count.num_in
        assert value_of(seen.scrapes[-1], "bimode_stage_done_rows", **labels) == count.num_in


def test_at_the_end_calls_and_tokens_are_those_that_the_run_paid(seen: Seen) -> None:
    assert len(seen.paid) >= 6
    for key, usage in seen.paid.items():
        labels = {"stage": key.stage, "purpose": key.purpose, "source": key.source, "model": key.model}
        for name, number in {
            "calls": usage.num_calls,
            "failures": usage.num_failures,
            "replies": usage.num_replies,
            "reused": usage.num_reused,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }.items():
            assert value_of(seen.scrapes[-1], f"bimode_teacher_{name}_total", **labels) == number


def test_attempts_and_retries_are_those_that_the_teacher_saw(seen: Seen) -> None:
    paid = total_usage(seen.paid.values())
    assert since_the_start(seen, "bimode_teacher_attempts_total") == len(seen.calls)
    assert since_the_start(seen, "bimode_teacher_attempts_total", outcome="answered") == paid.num_calls
    assert since_the_start(seen, "bimode_teacher_attempt_seconds_count") == paid.num_calls
    assert since_the_start(seen, "bimode_teacher_retries_total") == paid.num_retries > 10
    asked = Counter(call.purpose for call in seen.calls)
    for purpose, number in asked.items():
        assert since_the_start(seen, "bimode_teacher_attempts_total", purpose=purpose) == number


def test_journals_and_verdicts_are_counted(seen: Seen) -> None:
    assert since_the_start(seen, "bimode_journal_bytes_total") > 100 * len(seen.calls)
    assert since_the_start(seen, "bimode_journal_sync_seconds_count") > 5
    assert set(seen.verdicts) >= {"correct", "wrong"}
    for outcome, number in seen.verdicts.items():
        assert value_of(seen.scrapes[-1], "bimode_verifications_total", outcome=outcome) == number


def test_stages_appear_as_they_are_done(seen: Seen) -> None:
    running = [name for name, labels in seen.scrapes[2] if name == "bimode_stage_running"]
    assert len(running) == 3 and value_of(seen.scrapes[2], "bimode_stage_running", stage="routing") == 0
    assert value_of(seen.scrapes[-1], "bimode_stage_seconds", stage="corpus") > 0
    assert value_of(seen.scrapes[-1], "bimode_run_info", run=RUN, corpus="cards") == 1
    assert value_of(seen.scrapes[-1], "process_resident_memory_bytes") > 0


def test_counters_never_fall(seen: Seen) -> None:
    for earlier, later in zip(seen.scrapes, seen.scrapes[1:], strict=False):
        for sample, value in earlier.items():
            if sample[0].endswith(("_total", "_count", "_bucket")):
                assert later[sample] >= value


def test_no_label_holds_a_row_or_the_key(seen: Seen) -> None:
    rows = {line["row"] for line in seen.log if "row" in line}
    values = {value for _, labels in seen.scrapes[-1] for _, value in labels}
    assert rows and not rows & values
    assert not [value for value in values if seen.secret in value]


def test_the_last_run_is_left_in_a_file_for_node_exporter(seen: Seen) -> None:
    path = last_run_path(seen.folder / "textfiles", "cards")
    left = parsed(path.read_text(encoding="utf-8"))
    assert value_of(left, "bimode_last_run_success", corpus="cards") == 1
    ended = value_of(left, "bimode_last_run_end_timestamp_seconds", corpus="cards")
    assert value_of(left, "bimode_last_success_timestamp_seconds", corpus="cards") == ended
    kept = value_of(seen.scrapes[-1], "bimode_rows_total", stage="answers", outcome="kept")
    assert value_of(left, "bimode_last_run_rows", corpus="cards", stage="answers", outcome="kept") == kept
    calls = total_usage(seen.paid.values()).num_calls
    assert value_of(left, "bimode_last_run_teacher", corpus="cards", kind="calls") == calls


def test_a_failed_run_keeps_the_time_of_the_last_success(tmp_path: Path) -> None:
    books = RunBooks(RUN, "exams/../x")
    path = last_run_path(tmp_path, "exams/../x")
    assert path.parent == tmp_path and path.name == "bimode-exams_.._x.prom"
    write_last_run(tmp_path, books, has_succeeded=False, now=50.0)
    assert "bimode_last_success" not in path.read_text(encoding="utf-8")
    write_last_run(tmp_path, books, has_succeeded=True, now=100.0)
    write_last_run(tmp_path, books, has_succeeded=False, now=200.0)
    left = parsed(path.read_text(encoding="utf-8"))
    assert value_of(left, "bimode_last_run_success") == 0
    assert value_of(left, "bimode_last_run_end_timestamp_seconds") == 200
    assert value_of(left, "bimode_last_success_timestamp_seconds") == 100
    path.write_bytes(b"\xff\x00 torn")
    write_last_run(tmp_path, books, has_succeeded=False, now=300.0)
    assert "bimode_last_success" not in path.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_said_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    write_last_run(tmp_path / "file", RunBooks(RUN, "c"), has_succeeded=True, now=1.0)
    assert "BIMODE_METRICS_FOLDER" in caplog.text


def test_a_port_that_is_taken_is_said_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = TelemetrySettings.of_environment({"BIMODE_METRICS_PORT": str(taken.getsockname()[1])})
        with served(settings, CollectorRegistry()) as port:
            assert port is None
    assert f"BIMODE_METRICS_PORT={settings.metrics_port[0]} cannot be used" in caplog.text


def test_of_a_range_of_ports_each_process_takes_a_free_one(free_port: int) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        settings = TelemetrySettings(metrics_port=(free_port, free_port + 1))
        with served(settings, CollectorRegistry()) as port:
            assert port in {free_port + 1, None}
    with served(TelemetrySettings(metrics_port=(free_port,)), CollectorRegistry()) as port:
        assert port == free_port and scrape(port) == {}


def test_the_endpoint_ends_with_its_run(free_port: int) -> None:
    threads = threading.active_count()
    with served(TelemetrySettings(metrics_port=(free_port,)), CollectorRegistry()):
        assert threading.active_count() > threads
    with pytest.raises(OSError, match="refused"):
        scrape(free_port)


def test_sources_and_reasons_beyond_the_first_count_as_others() -> None:
    names = [f"s{number}" for number in range(MAX_SOURCES + 10)]
    books = RunBooks(RUN, "c", names)
    paid = {UsageKey("routing", "topic", name, "m"): Usage(num_calls=1) for name in names}
    books.view = lambda: RuntimeView(paid=paid)
    reasons = Counter({f"r{number}": 1 for number in range(MAX_REASONS + 30)})
    books.stages["routing"] = StageBook(0.0, 10, count=StageCount(num_in=130, dropped=reasons))
    samples = shown(books)
    assert value_of(samples, "bimode_teacher_calls_total", source=OTHER) == 10
    assert value_of(samples, "bimode_teacher_calls_total") == MAX_SOURCES + 10
    assert value_of(samples, "bimode_rows_total", reason=OTHER) == 30
    assert value_of(samples, "bimode_rows_total", outcome="dropped") == MAX_REASONS + 30


def test_an_address_that_two_ask_is_one_line_with_the_worse_state() -> None:
    books = RunBooks(RUN, "c")
    books.view = lambda: RuntimeView(
        endpoints=(
            EndpointView("http://a/v1", "m", "up", 3, 16, 0),
            EndpointView("http://a/v1", "m", "down", 1, 8, 2),
            EndpointView("http://b/v1", "m", "out", 0, 16, 0),
        ),
        num_waiting={"m": 7},
    )
    samples = shown(books)
    assert value_of(samples, "bimode_endpoint_in_flight_sequences", endpoint="http://a/v1") == 4
    assert value_of(samples, "bimode_endpoint_window_sequences", endpoint="http://a/v1") == 24
    assert value_of(samples, "bimode_endpoint_deaths_total", endpoint="http://a/v1") == 2
    assert value_of(samples, "bimode_endpoint_state", endpoint="http://a/v1", state="down") == 1
    assert value_of(samples, "bimode_endpoint_state", endpoint="http://a/v1", state="up") == 0
    assert value_of(samples, "bimode_endpoint_state", endpoint="http://b/v1", state="out") == 1
    assert value_of(samples, "bimode_teacher_waiting_calls", model="m") == 7


def test_a_busy_event_loop_shows_what_it_showed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(configuration(tmp_path / "none.jsonl", tmp_path / "work", "http://127.0.0.1:9/v1"))
    is_busy, may_end = threading.Event(), threading.Event()

    async def block() -> None:
        runtime.group(runtime.config.teacher)
        is_busy.set()
        may_end.wait()

    monkeypatch.setattr("flows.runtime._VIEW_SECONDS", 0.05)
    blocker = threading.Thread(target=lambda: runtime.run(block()))
    blocker.start()
    is_busy.wait()
    assert runtime.view() == RuntimeView(), "nothing was shown before"
    may_end.set()
    blocker.join()
    assert [seen.state for seen in runtime.view().endpoints] == ["up"]
    runtime.close()
    assert [seen.num_in_flight for seen in runtime.view().endpoints] == [0]


def test_nobody_listens_unless_a_port_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), served(TelemetrySettings(), CollectorRegistry()) as port:
        assert port is None and not caplog.records
