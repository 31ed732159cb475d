"""The flow itself, as Prefect runs it: one log, one trace, and no secret in what Prefect keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client

from flows.curate import curate
from teacher.fault_server import Fault, FaultSchedule
from tests.flows.telemetry.watched_world import OtlpReceiver, attributes_of, cards

pytestmark = pytest.mark.usefixtures("prefect")
SECRET = "Tr0ub4dor-3-planted"


def test_a_flow_run_is_one_trace_and_one_log_and_keeps_no_secret(
    tmp_path: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch, metrics_port: int
) -> None:
    monkeypatch.setenv("BIMODE_LOG_FORMAT", "json")
    monkeypatch.setenv("BIMODE_LOG_FILE", "run.jsonl")
    monkeypatch.setenv("BIMODE_API_KEY", SECRET)
    monkeypatch.setenv("BIMODE_TRACE_CALLS", "0.2")
    near = {"near": False, "images": "bytes"}
    with cards(tmp_path, 20, faults=FaultSchedule(share=0.2, kinds=(Fault.SERVER_ERROR,)), duplicates=near) as (
        config,
        _,
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        state = curate(str(tmp_path / "run.yaml"), return_state=True)
    assert state.is_completed(), state.message

    with get_client(sync_client=True) as client:
        flow_runs = client.read_flow_runs()
        logs = client.read_logs()
    (run,) = [flow_run for flow_run in flow_runs if flow_run.name.startswith("cards 2")]
    text = (tmp_path / "work" / "run.jsonl").read_text(encoding="ascii")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["run"] for line in lines} == {str(run.id)} and {line["corpus"] for line in lines} == {"cards"}
    assert SECRET not in text and not [log for log in logs if SECRET in log.message]

    messages = [line["message"] for line in lines]
    metrics = f"metrics at http://127.0.0.1:{metrics_port}/metrics"
    assert messages.count(metrics) == 1, "a library's message is there once"
    assert any(
        "rows in" in message and line["logger"] == "prefect.flow_runs"
        for message, line in zip(messages, lines, strict=True)
    )
    stages = [attributes_of(span)["bimode.stage"] for span in receiver.named("stage")]
    assert stages[:2] == ["sources", "duplicates"] and stages[-1] == "corpus"
    assert len({span.trace_id for span in receiver.spans}) == 1, "Prefect's own spans lead nowhere"
    above = {span.span_id for span in receiver.named("stage")}
    assert {span.parent_span_id for span in receiver.named("shard")} <= above
