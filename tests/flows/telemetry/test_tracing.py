from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from benchmarks.cards import configuration
from flows import telemetry
from flows.runtime import Runtime
from flows.stages import Progress
from flows.telemetry import tracing
from flows.telemetry.secrets import Redactor
from schemas.context import RunContext
from schemas.errors import TeacherUnreachable
from teacher.tracing import is_traced
from tests.flows.telemetry.calls import Fails, NameOfShard
from tests.flows.telemetry.conftest import has_provider
from tests.flows.telemetry.watched_world import RUN, OtlpReceiver, Seen, attributes_of

ROOT = Path(__file__).parents[3]


def by_id(spans: list[Span]) -> dict[bytes, Span]:
    return {span.span_id: span for span in spans}


def a_runtime(folder: Path) -> Runtime:
    return Runtime(configuration(folder / "none.jsonl", folder / "work", "http://127.0.0.1:9/v1"))


def test_spans_are_run_stage_shard_call(seen: Seen) -> None:
    spans = by_id(seen.receiver.spans)
    (run,) = seen.receiver.named("curate")
    assert run.parent_span_id == b"" and {span.trace_id for span in spans.values()} == {run.trace_id}
    stages = seen.receiver.named("stage")
    assert [attributes_of(stage)["bimode.stage"] for stage in stages][:2] == ["sources", "duplicates"]
    assert {stage.parent_span_id for stage in stages} == {run.span_id}
    shards = seen.receiver.named("shard")
    assert len(shards) == 16
    for shard in shards:
        above, its = attributes_of(spans[shard.parent_span_id]), attributes_of(shard)
        assert its["bimode.stage"] == above["bimode.stage"] and its["bimode.shard"].startswith("cards-0000")
        assert its["bimode.run"] == RUN
    calls = seen.receiver.named("chat cards")
    assert {spans[call.parent_span_id].name for call in calls} == {"shard"}
    stage_of = {"topic": "routing", "consistency": "reasoning", "direct": "answers"}
    for call in calls:
        purpose = attributes_of(call)["bimode.purpose"]
        assert attributes_of(spans[call.parent_span_id])["bimode.stage"] == stage_of.get(purpose, purpose)


def test_spans_end_after_those_below_them(seen: Seen) -> None:
    spans = by_id(seen.receiver.spans)
    for span in spans.values():
        if span.parent_span_id:
            above = spans[span.parent_span_id]
            assert above.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= above.end_time_unix_nano


def test_a_span_of_a_stage_says_what_became_of_its_rows(seen: Seen) -> None:
    (sources,) = [s for s in seen.receiver.named("stage") if attributes_of(s)["bimode.stage"] == "sources"]
    attributes = attributes_of(sources)
    assert (attributes["bimode.rows.in"], attributes["bimode.rows.quarantined"]) == (63, 2)


def test_each_call_has_its_span_with_its_tokens_and_failed_attempts(seen: Seen) -> None:
    calls = seen.receiver.named("chat cards")
    assert len(calls) == sum(usage.num_calls for usage in seen.paid.values())
    tokens = sum(attributes_of(call)["gen_ai.usage.output_tokens"] for call in calls)
    assert tokens == sum(usage.completion_tokens for usage in seen.paid.values())
    assert sum(len(call.events) for call in calls) == sum(usage.num_retries for usage in seen.paid.values())
    assert sum(attributes_of(call)["bimode.attempts"] for call in calls) == len(seen.calls)


def test_the_teacher_is_told_of_the_span_that_asks(seen: Seen) -> None:
    spans = {span.span_id.hex(): attributes_of(span) for span in seen.receiver.named("chat cards")}
    for call in seen.calls:
        _, _, span_id, flags = call.headers["traceparent"].split("-")
        assert spans[span_id]["bimode.purpose"] == call.purpose and int(flags, 16) & 1


def test_no_span_holds_a_question_an_answer_or_a_key(seen: Seen) -> None:
    sent = "".join(map(str, seen.receiver.spans))
    assert "What is their sum" not in sent and "zebra" not in sent and seen.secret not in sent
    assert seen.receiver.headers[0]["x-team"] == f"{seen.secret}-of-traces", "the receiver alone is told"
    assert {resource["service.name"] for resource in seen.receiver.resources} == {"bimode"}


def test_a_line_of_the_log_names_its_span(seen: Seen) -> None:
    (run,) = seen.receiver.named("curate")
    failed = [line for line in seen.log if line["logger"] == "bimode.calls"]
    calls = {span.span_id.hex() for span in seen.receiver.named("chat cards")}
    assert {line["trace_id"] for line in failed} == {run.trace_id.hex()}
    assert {line["span_id"] for line in failed} <= calls


def test_a_failure_ends_every_span_above_it_with_an_error_and_no_secret(tmp_path: Path, receiver: OtlpReceiver) -> None:
    runtime = a_runtime(tmp_path)
    with (
        pytest.raises(TeacherUnreachable),
        telemetry.run(runtime, run_id=RUN),
        telemetry.stage("routing", Progress(1)),
    ):
        telemetry.watched({"s-0": Fails()})["s-0"](runtime, Progress(1))
    assert [span.name for span in receiver.spans] == ["shard", "stage", "curate"]
    for span in receiver.spans:
        assert span.status.code == Status.STATUS_CODE_ERROR and "no answer from" in span.status.message
        assert attributes_of(span)["error.type"] == "TeacherUnreachable"
        assert not span.events
    assert "Tr0ub4dor-3" not in str(receiver.spans)


def test_an_interrupted_run_ends_its_spans_too(tmp_path: Path, receiver: OtlpReceiver) -> None:
    with pytest.raises(KeyboardInterrupt), telemetry.run(a_runtime(tmp_path), run_id=RUN), telemetry.stage("routing"):
        raise KeyboardInterrupt
    assert [span.status.code for span in receiver.spans] == [Status.STATUS_CODE_ERROR] * 2


def test_threads_work_in_the_name_of_their_shard(tmp_path: Path, receiver: OtlpReceiver) -> None:
    runtime = a_runtime(tmp_path)
    with telemetry.run(runtime, run_id=RUN), telemetry.stage("routing", Progress(1)), ThreadPoolExecutor(4) as threads:
        calls = telemetry.watched({f"s-{number}": NameOfShard() for number in range(20)})
        said = list(threads.map(lambda call: call(runtime, Progress(1))[0], calls.values()))
    assert said == [RunContext(RUN, "cards", "routing", f"s-{number}") for number in range(20)]
    (stage,) = receiver.named("stage")
    assert {shard.parent_span_id for shard in receiver.named("shard")} == {stage.span_id}


def test_another_process_works_in_the_name_of_its_shard(tmp_path: Path, receiver: OtlpReceiver) -> None:
    runtime, told = a_runtime(tmp_path), tmp_path / "call.pickle"
    with telemetry.run(runtime, run_id=RUN), telemetry.stage("routing", Progress(1)):
        told.write_bytes(pickle.dumps((telemetry.watched({"s-7": NameOfShard()}, "bands")["s-7"], runtime)))
        program = (
            f"import pickle; call, runtime = pickle.load(open({str(told)!r}, 'rb')); from flows.stages import Progress;"
            "print(call(runtime, Progress(1))[0]); import logging; logging.getLogger('teacher.x').warning('hello')"
        )
        environment = {**os.environ, "BIMODE_LOG_FORMAT": "json", "BIMODE_METRICS_PORT": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == str(RunContext(RUN, "cards", "routing", "s-7"))
    (stage,), (shard,) = receiver.named("stage"), receiver.named("shard")
    assert shard.parent_span_id == stage.span_id and attributes_of(shard)["bimode.step"] == "bands"
    assert '"message": "hello"' in done.stderr and '"shard": "s-7"' in done.stderr


def test_without_a_receiver_no_span_is_made(tmp_path: Path) -> None:
    runtime = a_runtime(tmp_path)
    with telemetry.run(runtime, run_id=RUN) as run, telemetry.stage("routing", Progress(1)):
        assert run.tracer is None and run.headers == {} and not has_provider()
        (call,) = telemetry.watched({"s": NameOfShard()}).values()
        assert call(runtime, Progress(1))[0].shard == "s"
        assert not trace.get_current_span().is_recording() and not is_traced()


@pytest.mark.parametrize(
    ("environment", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], is_wanted: bool) -> None:
    assert tracing.is_wanted(environment) is is_wanted


def test_a_protocol_that_is_not_spoken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    assert not tracing.is_wanted(environment)
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'" in caplog.text


def test_a_receiver_that_is_away_stops_no_run(
    tmp_path: Path, receiver: OtlpReceiver, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    with telemetry.run(a_runtime(tmp_path), run_id=RUN) as run, telemetry.stage("routing"):
        assert run.tracer is not None
    assert not receiver.spans


def test_outside_a_run_nothing_is_watched(tmp_path: Path) -> None:
    calls = {"s": NameOfShard()}
    with telemetry.stage("routing", Progress(1)) as seen:
        seen.count([])
        assert telemetry.watched(calls) == calls
        assert calls["s"](a_runtime(tmp_path), Progress(1))[0] == RunContext()


def test_without_a_tracer_a_span_is_none() -> None:
    with tracing.span(None, "shard", {}, Redactor()) as span:
        assert not span.is_recording()
