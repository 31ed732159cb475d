"""Notifications: automations that a Prefect server gets with one command, `bimode notify --block TYPE/NAME`.

They call a block that the user has made on that server (Slack, Microsoft Teams, an e-mail service, any webhook), so no
address and no secret stands in a file of ours. Without the command no server has any of them. What they send names the
corpus, counts and codes, and links to the run in Prefect's UI: never a row, nor an error's text, which may quote one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument
from prefect.events import EventTrigger
from prefect.events.actions import ActionTypes, CallWebhook, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, Posture
from prefect.exceptions import ObjectNotFound

from flows.events import CORPUS_CREATED, QUARANTINE_EXCEEDED, RUN_RESTARTED
from schemas.errors import ConfigError

TAG = "bimode-notification"
_SLACK = timedelta(hours=12)
"""A night's run may begin late and take long: whether it brought a version is asked half a day later."""


@dataclass(frozen=True, slots=True)
class Template:
    """A notification. name: on the command line. title: of the automation. subject, body: in Prefect's Jinja."""

    name: str
    title: str
    description: str
    trigger: EventTrigger
    subject: str
    body: str

    def automation(self, block: BlockDocument) -> AutomationCore:
        """Returns the automation that calls a block. Raises ConfigError: it is no block to notify with."""
        return AutomationCore(
            name=self.title,
            description=self.description,
            enabled=True,
            tags=[TAG],
            trigger=self.trigger,
            actions=[_action(block, self.subject, self.body)],
        )


def templates(*, nights: int = 3) -> list[Template]:
    """Returns all notifications. nights: without a new version, after which `quiet` fires."""
    corpus = "{{ event.resource['prefect.resource.name'] }}"
    link = "\n{{ flow_run|ui_url }}"
    return [
        Template(
            "failed",
            "bimode: a run failed",
            "A curation or a training failed, crashed, or took too long.",
            _flow_trigger(["curate", "train"], ["Failed", "Crashed", "TimedOut"]),
            "bimode: {{ flow.name }} {{ flow_run.state.name|lower }}",
            "The run '{{ flow_run.name }}' of {{ flow.name }} ended as {{ flow_run.state.name }}." + link,
        ),
        Template(
            "restarted",
            "bimode: a crashed run was started again",
            "A run's host went, or its process was killed; another run goes on in its place.",
            EventTrigger(
                expect={RUN_RESTARTED}, match={"prefect.resource.id": "bimode.run.*"}, posture=Posture.Reactive
            ),
            "bimode: {{ event.payload.flow }} was started again",
            "The run '{{ event.resource['prefect.resource.name'] }}' of {{ event.payload.flow }} crashed; "
            "'{{ flow_run.name }}' goes on in its place." + link,
        ),
        Template(
            "quarantine",
            "bimode: too many rows quarantined",
            "A curation stopped because more rows could not be used than max_quarantine_share allows.",
            _corpus_trigger(QUARANTINE_EXCEEDED),
            f"bimode: {corpus} has too many rows in quarantine",
            f"{corpus}: {{{{ event.payload.quarantined }}}} of {{{{ event.payload.rows }}}} rows could not be used, "
            "after stage {{ event.payload.stage }}:{% for reason, number in event.payload.reasons.items() %} "
            "{{ number }} {{ reason }}{{ '.' if loop.last else ',' }}{% endfor %}" + link,
        ),
        Template(
            "quiet",
            "bimode: no new version",
            f"A corpus has had no new version for {nights} nights.",
            _corpus_trigger(CORPUS_CREATED, quiet=timedelta(days=nights) + _SLACK),
            f"bimode: {corpus} has had no new version for {nights} nights",
            f"{corpus}: {{{{ event.payload.version }}}} is still the newest, after {nights} nights.",
        ),
        Template(
            "created",
            "bimode: a new version",
            "A curation published a new version of a corpus.",
            _corpus_trigger(CORPUS_CREATED),
            f"bimode: {corpus} {{{{ event.payload.version }}}}",
            f"{corpus} {{{{ event.payload.version }}}}: {{{{ event.payload.rows }}}} rows, "
            "{{ event.payload.think }} think; {{ event.payload.added }} added. This run {{ event.payload.paid.text }}."
            + link,
        ),
        Template(
            "approval",
            "bimode: training waits for approval",
            "A new corpus would start a training, and a person is asked first (trigger.approval).",
            _flow_trigger(["train"], ["Suspended"]),
            "bimode: a training waits for approval",
            "The run '{{ flow_run.name }}' asks before it takes the GPUs. Resume it there:" + link,
        ),
    ]


def _flow_trigger(flows: Sequence[str], states: Sequence[str]) -> EventTrigger:
    """Returns a trigger on states of whole runs; the stages of a curation are flows of other names."""
    return EventTrigger(
        expect={f"prefect.flow-run.{state}" for state in states},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": list(flows)},
        posture=Posture.Reactive,  # without it, the server takes a new automation and no renewed one
    )


def _corpus_trigger(event: str, *, quiet: timedelta | None = None) -> EventTrigger:
    """Returns a trigger on an event of any corpus, or on its not being followed by another of the same corpus."""
    match = {"prefect.resource.id": "bimode.corpus.*"}
    if quiet is None:
        return EventTrigger(expect={event}, match=match, posture=Posture.Reactive)
    return EventTrigger(
        after={event},
        expect={event},
        match=match,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        within=quiet,
    )


def _action(block: BlockDocument, subject: str, body: str) -> ActionTypes:
    """Returns the action that sends a text by a block. A webhook gets JSON: {"text": ..., "subject": ...}."""
    kind = block.block_type.slug if block.block_type is not None else ""
    capabilities: Collection[str] = block.block_schema.capabilities if block.block_schema is not None else ()
    if "notify" in capabilities:
        return SendNotification(block_document_id=block.id, subject=subject, body=body)
    if kind == "webhook":
        fields = {"text": f"{subject}\n{body}", "subject": subject}
        payload = ", ".join(f'"{name}": {{% filter tojson %}}{text}{{% endfilter %}}' for name, text in fields.items())
        return CallWebhook(block_document_id=block.id, payload="{" + payload + "}")
    raise ConfigError(
        f"the block {kind}/{block.name} sends no notifications: use one of Prefect's notification blocks, or a webhook"
    )


def find_block(client: SyncPrefectClient, address: str) -> BlockDocument:
    """Returns the block "TYPE/NAME" of a server. Raises ConfigError: it has no such block."""
    kind, _, name = address.partition("/")
    if not kind or not name:
        raise ConfigError(f"--block {address!r} is not of the form TYPE/NAME, such as slack-webhook/team")
    try:
        return client.read_block_document_by_name(name=name, block_type_slug=kind, include_secrets=False)
    except ObjectNotFound as error:
        raise ConfigError(
            f"the Prefect server has no block {address}: make it in its UI under Blocks; `prefect block ls` lists all"
        ) from error


def apply(client: SyncPrefectClient, wanted: Sequence[Template], block: BlockDocument) -> dict[str, UUID]:
    """Makes or renews an automation for each template, and returns their ids by the templates' names."""
    ids = {}
    for template in wanted:
        automation = template.automation(block)
        found = _ours(client.read_automations_by_name(template.title))
        for surplus in found[1:]:
            client.delete_automation(surplus.id)
        if found:
            client.update_automation(found[0].id, automation)
        ids[template.name] = found[0].id if found else client.create_automation(automation)
    return ids


def remove(client: SyncPrefectClient, wanted: Sequence[Template]) -> list[str]:
    """Removes the automations of templates from a server; returns the names of those that it had."""
    removed = []
    for template in wanted:
        found = _ours(client.read_automations_by_name(template.title))
        for automation in found:
            client.delete_automation(automation.id)
        removed += [template.name] if found else []
    return removed


def states(client: SyncPrefectClient, wanted: Sequence[Template]) -> dict[str, str]:
    """Returns for each template, by its name, whether the server has it: "on", "off" or "absent"."""
    known: dict[str, Any] = {}
    for template in wanted:
        found = _ours(client.read_automations_by_name(template.title))
        known[template.name] = ("on" if found[0].enabled else "off") if found else "absent"
    return known


def _ours(automations: Sequence[Automation]) -> list[Automation]:
    """Returns those that this module made; a user may have some of the same name."""
    return [automation for automation in automations if TAG in automation.tags]
