"""The events that runs emit, for automations and for Prefect's event feed.

Every event but the last is of the resource `bimode.corpus.NAME`, NAME being the corpus' name in its configuration;
Prefect adds the flow run, its flow, its deployment and their tags as related resources. A payload holds counts, codes
and places: never a row, never a message that may quote one, never a secret.

| event                        | when                                              | payload                           |
|------------------------------|---------------------------------------------------|-----------------------------------|
| `bimode.stage.finished`      | all shards of a stage are done                    | stage, in, kept, dropped,         |
|                              |                                                   | quarantined, seconds              |
| `bimode.corpus.created`      | a run published a new version that has rows;      | the record of the run: corpus,    |
|                              | starts `train/bimode`, see `prefect.yaml`         | report, version, rows, think,     |
|                              |                                                   | added, paid, ...                  |
| `bimode.corpus.unchanged`    | a run found nothing that makes another version    | corpus, version, rows,            |
|                              |                                                   | new_teacher_calls                 |
| `bimode.quarantine.exceeded` | more rows were quarantined than the settings      | stage, rows, quarantined,         |
|                              | allow; the run stops, `bimode.run.failed` follows | max_quarantine_share, reasons     |
| `bimode.run.failed`          | a run ended with an error (one whose process was  | stage, error (its class),         |
|                              | killed cannot tell: `prefect.flow-run.Crashed`)   | exit_code                         |
| `bimode.run.restarted`       | `bimode watch` started a run in place of one that | run, lost, flow                   |
|                              | crashed; of the resource `bimode.run.ID`          |                                   |

A training that waits for approval is Prefect's own `prefect.flow-run.Suspended` of the flow `train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.events import emit_event

STAGE_FINISHED = "bimode.stage.finished"
CORPUS_CREATED = "bimode.corpus.created"
CORPUS_UNCHANGED = "bimode.corpus.unchanged"
QUARANTINE_EXCEEDED = "bimode.quarantine.exceeded"
RUN_FAILED = "bimode.run.failed"
RUN_RESTARTED = "bimode.run.restarted"


def corpus_resource(name: str) -> str:
    """Returns the id of the resource of a corpus. The whole name, so that corpora in folders of like names differ."""
    return f"bimode.corpus.{name}"


def emit(event: str, corpus: str, payload: Mapping[str, Any]) -> None:
    """Emits one of the events above. corpus: its name. payload: plain JSON-able values."""
    resource = {"prefect.resource.id": corpus_resource(corpus), "prefect.resource.name": corpus}
    emit_event(event, resource=resource, payload=dict(payload))
