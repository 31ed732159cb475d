"""Nights of `curate/bimode` as deployed, on a real server with a real worker: what the UI shows of them in a real
browser, who is notified, and what two runs at once do. The teacher is scripted.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import httpx
import pytest
import typer
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.callables import parameter_schema
from typer.testing import CliRunner

from flows import automations, stack
from flows.commands.notify import notify
from flows.curate import NO_NEWS, curate
from flows.holding import held
from flows.workspace import Workspace
from schemas.config import PerformanceConfig
from schemas.overrides import SECTIONS, SETTINGS
from tests.flows.chromium import Chromium, chromium_path
from tests.flows.scripted_world import scripted_answer, write_config, write_questions
from tests.replay_teacher import ReplayTeacher
from tests.waiting import free_port, wait_for

ROOT = Path(__file__).parents[2]
HOSTILE = "![x](http://127.0.0.1:{port}/md.png)<img src=http://127.0.0.1:{port}/html.png>.png"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
INTERFACES = {"the older interface": "", "the newer interface": "/v2"}


# The form, as a schema


def test_the_form_has_every_plain_setting_of_its_sections_with_its_description_and_limits() -> None:
    schema = parameter_schema(curate).model_dump_for_openapi()
    form = schema["definitions"]["RunOverrides"]["properties"]
    assert list(form) == [*SETTINGS, *SECTIONS]
    assert form["performance"]["title"] == "Performance"
    performance = schema["definitions"]["PerformanceOverrides"]["properties"]
    left_out = {"waves"}  # `auto` or a list: no form has a field for either
    assert performance.keys() == PerformanceConfig.model_fields.keys() - left_out
    for name, shown in performance.items():
        assert shown["description"].startswith(PerformanceConfig.model_fields[name].description or "?")
    assert performance["num_samples"]["minimum"] == 1
    assert performance["audit_share"]["maximum"] == 1.0
    assert performance["exhaustive"]["enum"] == [True, False]


def test_the_form_fills_in_nothing_of_its_own_and_offers_no_second_type() -> None:
    schema = parameter_schema(curate).model_dump_for_openapi()
    sections = [part for name, part in schema["definitions"].items() if name.endswith("Overrides")]
    assert len(sections) == 1 + len(SECTIONS)
    for section in sections:
        for name, shown in section["properties"].items():
            assert "default" not in shown and "anyOf" not in shown, name
    assert schema["properties"]["overrides"]["default"] == {}
    for name, parameter in schema["properties"].items():
        assert parameter["description"], name
        assert "anyOf" not in parameter and parameter.get("default", "") is not None, name


# A server, a worker, a teacher, and someone who is notified


class Receiver(ThreadingHTTPServer):
    """Keeps what is posted to it, and the paths of everything else that is asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Keep)
        self.posted: list[dict[str, Any]] = []
        self.asked: list[str] = []

    @property
    def subjects(self) -> set[str]:
        return {post["subject"] for post in self.posted}


class _Keep(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_error(404)

    def log_message(self, format: str, *arguments: Any) -> None:  # silence
        del format, arguments


@dataclass
class Site:
    """A project folder with its stack running. runs: of the nights below, by name."""

    home: Path
    teacher: ReplayTeacher
    receiver: Receiver
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def api_url(self) -> str:
        return stack.status().api_url

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Returns what Prefect's server replies. A busy one (503 or silence: a locked database) is asked again."""

        def ask() -> httpx.Response | None:
            try:
                found = httpx.request(method, self.api_url + path, json=body, timeout=60, trust_env=False)
            except httpx.ReadTimeout:
                return None
            return None if found.status_code == httpx.codes.SERVICE_UNAVAILABLE else found

        reply = wait_for(ask, every=1)
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def start(self, **parameters: Any) -> str:
        found = self.call("GET", "/deployments/name/curate/bimode")
        body = {
            "parameters": found["parameters"] | {"config": "run.yaml"} | parameters,
            "state": {"type": "SCHEDULED"},
            "idempotency_key": str(uuid4()),
        }
        return str(self.call("POST", f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/flow_runs/{run_id}"))

    def ended(self, run_id: str) -> dict[str, Any]:
        wait_for(lambda: self.run(run_id)["state_type"] in FINAL)
        return self.run(run_id)

    def logs(self, run_id: str) -> str:
        found = self.call("POST", "/logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}})
        return "\n".join(line["message"] for line in found)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Returns what was told under this name, waiting for the first: the server writes events in batches, late."""
        body = {"filter": {"event": {"name": [name]}}}
        return wait_for(lambda: self.call("POST", "/events/filter", body)["events"])

    def artifact(self, run_id: str, key: str) -> dict[str, Any]:
        return next(artifact for artifact in self.artifacts(run_id) if artifact["key"] == key)

    def artifacts(self, run_id: str) -> list[dict[str, Any]]:
        body = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
        return list(self.call("POST", "/artifacts/filter", body))


def make_home(home: Path, teacher: ReplayTeacher, receiver: Receiver) -> None:
    """Writes the project's own deployments, and a run with two rows that cannot be used, one of them hostile."""
    shutil.copy(ROOT / "prefect.yaml", home)
    questions = write_questions(home / "in", 24)
    hostile = {"id": "h", "question": "Whose?", "image": HOSTILE.format(port=receiver.server_port)}
    with questions.open("a", encoding="utf-8") as file:
        file.write(json.dumps(hostile) + '\n{"id": "e", "question": ""}\n')
    write_config(home, questions, teacher.url, name="nightly")
    (home / ".local").mkdir()
    (home / ".local" / "api_url").write_text(f"http://127.0.0.1:{free_port()}/api", encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("site")
    receiver = Receiver()
    thread = Thread(target=receiver.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, ReplayTeacher(scripted_answer, models=["scripted"]) as teacher:
        make_home(home, teacher, receiver)
        patch.setenv("BIMODE_HOME", str(home))
        stack.up(Path("run.yaml"), report=lambda line: None)
        try:
            yield Site(home, teacher, receiver)
        finally:
            stack.down(lambda line: None)
            receiver.shutdown()
            thread.join()
            receiver.server_close()


def notified(*arguments: str, api_url: str) -> str:
    app = typer.Typer()
    app.command()(notify)
    result = CliRunner().invoke(app, [*arguments, "--api-url", api_url])
    assert result.exit_code == 0, result.output
    return result.output


def set_up_notifications(site: Site) -> None:
    """By the command, with a webhook and with a notification block; `quiet` comes after seconds instead of nights."""
    address = f"http://127.0.0.1:{site.receiver.server_port}/"
    fields = {"text": "{{subject}}\n{{body}}", "subject": "{{subject}}"}
    with temporary_settings({PREFECT_API_URL: site.api_url}):
        Webhook(url=address).save("receiver")  # type: ignore[arg-type]
        CustomWebhookNotificationBlock(name="x", url=address, json_data=fields).save("receiver")
        with get_client(sync_client=True) as client:
            quiet = next(found for found in automations.templates() if found.name == "quiet")
            soon = quiet.trigger.model_copy(update={"within": timedelta(seconds=10)})
            block = automations.find_block(client, "webhook/receiver")
            automations.apply(client, [replace(quiet, trigger=soon)], block)
    notified("--block", "webhook/receiver", "--only", "created", "--only", "approval", api_url=site.api_url)
    notified("--block", "custom-webhook/receiver", "--only", "failed", "--only", "quarantine", api_url=site.api_url)


@pytest.fixture(scope="module")
def nights(site: Site) -> Site:
    """A first run; then one that waits for the holder of the work folder, and one more that waits for it."""
    set_up_notifications(site)
    # The deployment's own limit is looked at: the pool would hold the third run back before.
    site.call("PATCH", f"/work_pools/{stack.POOL}", {"concurrency_limit": 2})
    site.runs["first"] = site.ended(site.start(overrides={"performance": {"audit_share": 0.5}}))
    site.seen["calls of the first"] = str(len(site.teacher.calls))
    same = {"performance": {"audit_share": 0.5}}
    with held(Workspace(site.home / "work"), "someone by hand", wait=False, say=print):
        second = site.start(overrides=same)
        wait_for(lambda: "waiting for someone by hand (process " in site.logs(second))
        third = site.start(overrides=same | {"max_quarantine_share": 0})
        wait_for(lambda: site.run(third)["state_name"] == "AwaitingConcurrencySlot")
        site.seen["second while the third waits"] = site.run(second)["state_type"]
    site.runs["second"], site.runs["third"] = site.ended(second), site.ended(third)
    return site


@pytest.mark.slow
def test_a_new_version_is_told_by_the_run_its_artifacts_and_one_event(nights: Site) -> None:
    run = nights.runs["first"]
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert re.fullmatch(r"nightly 20\d\d-\d\d-\d\d \d\d:\d\d", run["name"])
    assert set(run["tags"]) == {"curation", "corpus:nightly", "new-version"}
    assert re.fullmatch(r"nightly v0001: 24 rows, \d+ think", run["state"]["message"])
    assert run["parameters"]["overrides"] == {"performance": {"audit_share": 0.5}}
    assert "for this run alone: performance.audit_share = 0.5" in nights.logs(run["id"])
    shown = {artifact["key"]: artifact for artifact in nights.artifacts(run["id"])}
    assert shown.keys() == {f"nightly-{what}" for what in ("progress", "funnel", "quarantine", "cost", "version")}
    assert shown["nightly-progress"]["data"] == 100.0
    funnel = json.loads(shown["nightly-funnel"]["data"])
    assert (funnel[0]["rows in"], funnel[0]["quarantined"], funnel[-1]["kept"]) == ("26", "2", "24")
    assert str(shown["nightly-version"]["data"]).startswith("# New version `v0001`")
    [event] = nights.events("bimode.corpus.created")
    assert event["resource"]["prefect.resource.id"] == "bimode.corpus.nightly"
    assert event["payload"]["corpus"] == str(nights.home / "work" / "corpus" / "v0001")


@pytest.mark.slow
def test_stages_are_runs_of_their_own_with_tags_a_progress_and_an_event(nights: Site) -> None:
    body = {"flow_runs": {"tags": {"all_": ["corpus:nightly", "stage:performance"]}}}
    stage, *_ = nights.call("POST", "/flow_runs/filter", body)
    assert stage["name"] == "nightly: performance heuristic"
    assert [artifact["key"] for artifact in nights.artifacts(stage["id"])] == ["nightly-progress-performance"]
    tasks = nights.call("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [stage["id"]]}}})
    assert {tuple(task["tags"]) for task in tasks} == {()}, "a tag of a task costs a call for each shard"
    told = [event["payload"] for event in nights.events("bimode.stage.finished")]
    counted = next(payload for payload in told if payload["stage"] == "sources")
    assert (counted["in"], counted["kept"], sum(counted["quarantined"].values())) == (26, 24, 2)


@pytest.mark.slow
def test_a_night_without_news_makes_no_version_no_training_and_no_call_and_says_so(nights: Site) -> None:
    run = nights.runs["second"]
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", NO_NEWS), run["state"]["message"]
    assert run["state"]["message"].startswith("nightly v0001 stays the newest version; this run paid nothing")
    assert set(run["tags"]) == {"curation", "corpus:nightly", "no-news"}
    page = str(nights.artifact(run["id"], "nightly-version")["data"])
    assert page.startswith("# No news: `v0001`") and "paid nothing" in page
    assert len(nights.events("bimode.corpus.created")) == 1, "it triggers training"
    [event] = nights.events("bimode.corpus.unchanged")
    assert (event["payload"]["version"], event["payload"]["new_teacher_calls"]) == ("v0001", 0)
    assert len(nights.teacher.calls) == int(nights.seen["calls of the first"])
    assert [path.name for path in (nights.home / "work" / "corpus").glob("v*")] == ["v0001"]


@pytest.mark.slow
def test_of_two_runs_at_once_the_second_waits_for_its_turn(nights: Site) -> None:
    assert nights.seen["second while the third waits"] == "RUNNING"
    first, second = nights.runs["second"], nights.runs["third"]
    assert second["start_time"] >= first["end_time"]


@pytest.mark.slow
def test_a_run_that_stops_for_its_quarantine_shows_it_and_tells_what_was_counted(nights: Site) -> None:
    run = nights.runs["third"]
    assert run["state_type"] == "FAILED"
    assert "2 of 26 rows are quarantined (1 image_missing, 1 question_empty)" in run["state"]["message"]
    assert "**More than the 0 % allowed" in str(nights.artifact(run["id"], "nightly-quarantine")["data"])
    [event] = nights.events("bimode.quarantine.exceeded")
    assert event["payload"] == {
        "stage": "sources",
        "rows": 26,
        "quarantined": 2,
        "max_quarantine_share": 0.0,
        "reasons": {"image_missing": 1, "question_empty": 1},
    }
    [failure] = nights.events("bimode.run.failed")
    assert failure["payload"] == {"stage": "sources", "error": "QuarantineExceeded", "exit_code": 5}


@pytest.mark.slow
def test_notifications_really_call_the_address_of_the_user_s_block(nights: Site) -> None:
    wanted = {
        "bimode: nightly v0001",
        "bimode: nightly has too many rows in quarantine",
        "bimode: curate failed",
        "bimode: nightly has had no new version for 3 nights",
    }
    wait_for(lambda: nights.receiver.subjects >= wanted)
    assert nights.receiver.subjects == wanted, "nobody waits for approval"
    texts = {post["subject"]: post["text"] for post in nights.receiver.posted}
    assert "nightly v0001: 24 rows, " in texts["bimode: nightly v0001"]
    link = f"/runs/flow-run/{nights.runs['third']['id']}"
    assert link in texts["bimode: curate failed"]
    told = "2 of 26 rows could not be used, after stage sources: 1 image_missing, 1 question_empty."
    assert told in texts["bimode: nightly has too many rows in quarantine"]
    assert "md.png" not in json.dumps(nights.receiver.posted), "no text of a row leaves the server"


@pytest.mark.slow
def test_notifications_are_renewed_in_place_listed_and_removed(site: Site) -> None:
    notified("--block", "webhook/receiver", "--only", "approval", "--json", api_url=site.api_url)
    notified("--block", "webhook/receiver", "--only", "approval", api_url=site.api_url)
    found = site.call(
        "POST", "/automations/filter", {"automations": {"name": {"any_": ["bimode: training waits for approval"]}}}
    )
    assert len(found) == 1
    assert json.loads(notified("--only", "approval", "--json", api_url=site.api_url)) == {"approval": "on"}
    assert notified("--remove", "--only", "approval", api_url=site.api_url).split()[:2] == ["approval", "absent"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"performance": {"num_samples": 0}}, "overrides.performance.num_samples'. Failure reason: 0 is less than"),
        ({"performance": {"samples": 3}}, "'samples' was unexpected"),
        ({"duplicates": {"near": "maybe"}}, "'maybe' is not one of [True, False]"),
    ],
)
def test_the_server_refuses_wrong_overrides_before_any_work(site: Site, overrides: Any, said: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as refusal:
        site.start(overrides=overrides)
    assert refusal.value.response.status_code == 409
    assert said in refusal.value.response.json()["detail"]


# In a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    if chromium_path() is None:
        pytest.skip("NO BROWSER: the UI was not looked at; install Debian's package chromium")
    with Chromium(tmp_path / "profile") as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("path", INTERFACES.values(), ids=INTERFACES.keys())
def test_the_form_of_a_custom_run_shows_settings_with_their_descriptions(
    site: Site, browser: Chromium, path: str, tmp_path: Path
) -> None:
    deployment = site.call("GET", "/deployments/name/curate/bimode")["id"]
    ui = site.api_url.removesuffix("/api") + path
    browser.open(f"{ui}/deployments/deployment/{deployment}/run", until="Max Quarantine Share")
    for said in (
        "Wait for a run that is at work in the same folder.",
        "Settings for this run alone.",
        "Stop when more than this share of all rows is quarantined. Left empty: what the file says, else 0.1.",
        "Samples per question; the paper's N. Left empty: what the file says, else 8.",
        "Rows whose probability of needing reasoning is at least this think.",
    ):
        text = browser.text(until=said)
    browser.picture(tmp_path / "form.png")
    assert "Property is type" not in text, "a setting of two types"


@pytest.mark.slow
def test_the_ui_of_the_local_stack_asks_nobody_outside(site: Site, browser: Chromium) -> None:
    ui = site.api_url.removesuffix("/api")
    browser.open(ui, until="Deployments")
    assert browser.asked_hosts() == {ui.removeprefix("http://")}


@pytest.mark.slow
@pytest.mark.parametrize("path", INTERFACES.values(), ids=INTERFACES.keys())
def test_a_hostile_row_stays_text_and_calls_nobody(nights: Site, browser: Chromium, path: str, tmp_path: Path) -> None:
    ui = nights.api_url.removesuffix("/api") + path
    for key, until in (("quarantine", "image_missing"), ("funnel", "difficulty heuristic"), ("version", "New version")):
        artifact = nights.artifact(nights.runs["first"]["id"], f"nightly-{key}")
        text = browser.open(f"{ui}/artifacts/artifact/{artifact['id']}", until=until)
        browser.picture(tmp_path / f"{key}.png")
        assert key != "quarantine" or HOSTILE.format(port=nights.receiver.server_port) in text
        links = browser.run("[...document.querySelectorAll('a, img')].map(e => e.href || e.src).join('\\n')")
        assert "md.png" not in links and "html.png" not in links
    assert nights.receiver.asked == []


@pytest.mark.slow
def test_the_page_of_a_run_shows_its_artifacts(nights: Site, browser: Chromium, tmp_path: Path) -> None:
    ui = nights.api_url.removesuffix("/api")
    run = nights.runs["first"]
    browser.open(f"{ui}/v2/runs/flow-run/{run['id']}?tab=Artifacts", until="nightly-quarantine")
    for said in ("corpus:nightly", "new-version", "nightly-version", "nightly-funnel", "nightly-cost"):
        browser.text(until=said)
    browser.picture(tmp_path / "run.png")
