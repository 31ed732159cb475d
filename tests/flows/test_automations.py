"""Notifications as automations: what fires them, what they say, and what a wrong block leads to.

That a real server calls a real address is tested in `test_prefect_ui.py`.
"""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
import typer
from prefect.client.schemas.objects import BlockDocument, BlockSchema, BlockType
from prefect.events.actions import CallWebhook, SendNotification
from prefect.server.events.actions import SendNotification as ServerNotification
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.server.utilities.user_templates import render_user_template_sync
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.types._datetime import now
from typer.testing import CliRunner

from flows.automations import Template, find_block, templates
from flows.commands.notify import EXAMPLES, notify
from flows.events import CORPUS_CREATED, QUARANTINE_EXCEEDED, RUN_RESTARTED, corpus_resource
from schemas.errors import ConfigError

BLOCK = UUID("0b8f1f3e-4c0c-4f6e-9d8e-0e5a6f0f7a11")


def block(kind: str, *capabilities: str) -> BlockDocument:
    schema = BlockSchema(checksum="sha256:x", block_type_id=BLOCK, capabilities=list(capabilities), fields={})
    return BlockDocument(
        id=BLOCK,
        name="team",
        block_type=BlockType(name=kind, slug=kind),
        block_type_id=BLOCK,
        block_schema=schema,
        block_schema_id=BLOCK,
    )


def template(name: str) -> Template:
    return next(template for template in templates() if template.name == name)


def event(name: str, resource: dict[str, str], payload: dict[str, Any], *related: dict[str, str]) -> ReceivedEvent:
    return ReceivedEvent(
        occurred=now("UTC"), event=name, resource=resource, payload=payload, related=list(related), id=BLOCK
    )


def corpus_event(name: str, **payload: Any) -> ReceivedEvent:
    resource = {"prefect.resource.id": corpus_resource("charts"), "prefect.resource.name": "charts"}
    return event(name, resource, payload)


def flow_event(state: str, flow: str) -> ReceivedEvent:
    related = {
        "prefect.resource.id": f"prefect.flow.{BLOCK}",
        "prefect.resource.role": "flow",
        "prefect.resource.name": flow,
    }
    return event(f"prefect.flow-run.{state}", {"prefect.resource.id": f"prefect.flow-run.{BLOCK}"}, {}, related)


def restarted_event() -> ReceivedEvent:
    resource = {"prefect.resource.id": f"bimode.run.{BLOCK}", "prefect.resource.name": "charts 2025-12-31"}
    return event(RUN_RESTARTED, resource, {"run": str(BLOCK), "lost": str(BLOCK), "flow": "curate"})


def fires_on(name: str, seen: ReceivedEvent) -> bool:
    """Returns what Prefect's server makes of the trigger."""
    trigger = ServerTrigger.model_validate(template(name).trigger.model_dump())
    return trigger.covers(seen) and trigger.expects(seen.event)


@pytest.mark.parametrize(
    ("name", "seen", "fires"),
    [
        ("failed", flow_event("Failed", "curate"), True),
        ("failed", flow_event("Crashed", "train"), True),
        ("failed", flow_event("Failed", "difficulty"), False),
        ("failed", flow_event("Completed", "curate"), False),
        ("approval", flow_event("Suspended", "train"), True),
        ("approval", flow_event("Suspended", "curate"), False),
        ("created", corpus_event(CORPUS_CREATED), True),
        ("created", corpus_event(QUARANTINE_EXCEEDED), False),
        ("quarantine", corpus_event(QUARANTINE_EXCEEDED), True),
        ("quiet", corpus_event(CORPUS_CREATED), True),
        ("restarted", restarted_event(), True),
        ("restarted", flow_event("Crashed", "curate"), False),
    ],
)
def test_each_notification_is_for_its_own_events(name: str, seen: ReceivedEvent, fires: bool) -> None:
    assert fires_on(name, seen) is fires


def test_silence_is_counted_in_nights_and_for_each_corpus_by_itself() -> None:
    quiet = next(template for template in templates(nights=7) if template.name == "quiet")
    assert quiet.trigger.within.days == 7
    assert quiet.trigger.for_each == {"prefect.resource.id"}
    assert "for 7 nights" in quiet.subject


def rendered(text: str, seen: ReceivedEvent) -> str:
    return str(render_user_template_sync(text, {"event": seen, "flow_run": {"name": "charts 2026-01-01"}}))


def test_texts_are_made_of_counts_and_codes() -> None:
    quarantined = corpus_event(
        QUARANTINE_EXCEEDED,
        stage="sources",
        rows=100,
        quarantined=30,
        reasons={"image_missing": 20, "question_empty": 10},
    )
    text = rendered(template("quarantine").body.replace("|ui_url", ".name"), quarantined)
    assert text == (
        "charts: 30 of 100 rows could not be used, after stage sources: 20 image_missing, 10 question_empty.\n"
        "charts 2026-01-01"
    )
    created = corpus_event(CORPUS_CREATED, version="v0002", rows=100, think=30, added=10, paid={"text": "paid nothing"})
    assert rendered(template("created").subject, created) == "bimode: charts v0002"
    text = rendered(template("created").body.replace("|ui_url", ".name"), created)
    assert text.startswith("charts v0002: 100 rows, 30 think; 10 added. This run paid nothing.")
    again = rendered(template("restarted").body.replace("|ui_url", ".name"), restarted_event())
    assert again.startswith("The run 'charts 2025-12-31' of curate crashed; 'charts 2026-01-01' goes on in its place.")


@pytest.mark.parametrize("found", templates(), ids=lambda found: found.name)
def test_prefect_s_server_takes_every_template(found: Template) -> None:
    automation = found.automation(block("slack-webhook", "notify"))
    [action] = automation.actions
    assert isinstance(action, SendNotification)
    ServerNotification.model_validate(action.model_dump())
    ServerTrigger.model_validate(automation.trigger.model_dump())


def test_a_webhook_gets_json_whatever_the_texts_hold() -> None:
    [action] = template("created").automation(block("webhook")).actions
    assert isinstance(action, CallWebhook)
    hostile = 'v"0002\\\n</script>'
    seen = corpus_event(CORPUS_CREATED, version=hostile, rows=1, think=0, added=1, paid={"text": "paid nothing"})
    sent = json.loads(rendered(action.payload.replace("|ui_url", ".name"), seen))
    assert sent["subject"] == f"bimode: charts {hostile}"
    assert sent["text"].startswith(f"bimode: charts {hostile}\ncharts {hostile}: 1 rows")


def test_a_block_that_sends_nothing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the block secret/team sends no notifications"):
        template("created").automation(block("secret"))


@pytest.mark.parametrize("address", ["team", "/team", "slack-webhook/", ""])
def test_an_address_that_is_none_of_a_block_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form TYPE/NAME"):
        find_block(None, address)  # type: ignore[arg-type]


# The command

app = typer.Typer()
app.command(epilog=EXAMPLES)(notify)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--only", "everything"],
            "--only 'everything' is none of failed, restarted, quarantine, quiet, created, approval",
        ),
        (["--block", "webhook/x", "--remove"], "give one of them"),
        ([], "no Prefect server is known: start one with `bimode up`"),
    ],
)
def test_wrong_use_is_a_clear_error(
    arguments: list[str], said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIMODE_HOME", str(tmp_path))
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_server_that_does_not_answer_is_named() -> None:
    result = CliRunner().invoke(app, ["--api-url", "http://127.0.0.1:9/api"])
    assert result.exit_code == 9
    assert "the Prefect server at http://127.0.0.1:9/api does not answer" in result.output
