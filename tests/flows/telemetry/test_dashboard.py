"""Dashboard and alerts speak of metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.runtime_view import EndpointView, RuntimeView
from flows.telemetry.last_run import last_run_registry
from flows.telemetry.metrics import RunBooks, StageBook, registry_of
from schemas.fates import StageCount
from schemas.usage import Usage, UsageKey
from teacher import metrics

ROOT = Path(__file__).parents[3]
DASHBOARD = ROOT / "deploy" / "grafana" / "bimode.json"
PROMETHEUS = ROOT / "deploy" / "prometheus"
VLLM_LOGGERS = "lib/python3.11/site-packages/vllm/v1/metrics/loggers.py"

VLLM_METRICS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:mm_cache_hits_total",
    "vllm:mm_cache_queries_total",
    *(
        f"vllm:request_{part}_time_seconds_{suffix}"
        for part in ("queue", "prefill", "decode")
        for suffix in ("sum", "count")
    ),
}
"""Of vLLM's metrics, those that dashboard and alerts speak of; checked against vLLM 0.32."""
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")
_KEYWORDS = {"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring", "group_left", "group_right"}


def metric_names(expression: str) -> set[str]:
    """Returns the names of metrics in an expression of PromQL."""
    bare = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", _STRING.sub('""', expression)))
    bare = re.sub(r"\{[^}]*\}", "", bare)
    return {name for name in _NAME.findall(bare) if name not in _KEYWORDS}


def selected_labels(expression: str) -> Iterator[tuple[str, str]]:
    """Yields (metric, label) for each label that a selector names."""
    for name, matchers in _SELECTOR.findall(_STRING.sub('""', expression)):
        yield from ((name, label) for label in re.findall(r"(\w+)\s*[=!]", matchers))


def our_labels() -> dict[str, set[str]]:
    """Returns the labels of every sample that a run with everything in it exposes, by name."""
    books = RunBooks("r", "c", ["s"])
    count = StageCount(num_in=2, num_kept=1, dropped=Counter(x=1))
    books.stages["routing"] = StageBook(0.0, 2, count=count)
    view = RuntimeView(
        {UsageKey("routing", "topic", "s", "m"): Usage(num_calls=1)},
        (EndpointView("u", "m", "up", 0, 1, 0),),
        {"m": 0},
        {"correct": 1},
    )
    books.view = lambda: view
    metrics.ATTEMPTS.labels("u", "topic", metrics.ANSWERED).inc(0)
    metrics.ATTEMPT_SECONDS.labels("topic")
    metrics.RETRIES.labels("u", "teacher_error").inc(0)
    from flows.telemetry.metrics import SHARD_SECONDS

    SHARD_SECONDS.labels("routing", "done")
    labels: dict[str, set[str]] = {}
    last_run = last_run_registry(books, 1.0, has_succeeded=True, now=2.0)
    for registry in (registry_of(books), last_run):
        for family in registry.collect():
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def panel_expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


EXPRESSIONS = [*panel_expressions(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ('sum by (stage) (rate(a_total{x="b_total"}[$__rate_interval])) > 0.5', {"a_total"}),
        ("time() - a:b and on (instance, stage) c == 1", {"a:b", "c"}),
        ('histogram_quantile(0.99, sum by (le) (rate(h_bucket{i=~"$i"}[5m])))', {"h_bucket"}),
        ("a / (b > 0) offset 5m unless d", {"a", "b", "d"}),
    ],
)
def test_names_are_found_in_an_expression(expression: str, names: set[str]) -> None:
    found = metric_names(expression)
    assert found - {"5m"} == names


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_speaks_of_metrics_that_exist_and_of_labels_they_have(expression: str) -> None:
    ours = our_labels()
    names = metric_names(expression)
    assert names, "an expression is about something"
    assert names <= ours.keys() | VLLM_METRICS
    for name, label in selected_labels(expression):
        if name in ours:
            assert label in ours[name] | SCRAPED, f"{name} has no label {label}"


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    spoken = set().union(*map(metric_names, EXPRESSIONS))
    known = {re.sub(r"_(bucket|sum|count)$", "", name) for name in our_labels() if name.startswith("bimode_")}
    unspoken = known - {re.sub(r"_(bucket|sum|count)$", "", name) for name in spoken}
    asked_otherwise = {
        "bimode_run_info",  # chooses the process
        "bimode_teacher_calls_total",  # attempts say the same by what became of them
        "bimode_teacher_failures_total",
        "bimode_teacher_gpu_seconds_total",
        "bimode_stage_skipped_rows",
        "bimode_last_run_end_timestamp_seconds",
        "bimode_last_run_seconds",
        "bimode_last_run_rows",
        "bimode_last_run_teacher",
    }
    assert unspoken == asked_otherwise


def test_vllm_has_the_metrics_that_we_speak_of() -> None:
    source = ROOT / ".venv-gpu" / VLLM_LOGGERS
    if not source.exists():
        pytest.skip(f"vLLM's own names are NOT checked: there is no {source}")
    text = source.read_text(encoding="utf-8")
    for name in VLLM_METRICS:
        assert f'"{re.sub("_(total|sum|count|bucket)$", "", name)}"' in text, name


def test_panels_have_ids_places_and_units_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    taken = Counter(
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(taken.values()) == 1 and max(x for x, _ in taken) == 23
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables


def test_every_alert_says_what_is_wrong_and_how_urgent_it_is() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 9
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "description"}


def test_prometheus_reads_the_alerts_that_lie_beside_its_configuration() -> None:
    loaded = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    assert [(PROMETHEUS / name).exists() for name in loaded["rule_files"]] == [True]
    assert [job["job_name"] for job in loaded["scrape_configs"]] == ["bimode", "vllm", "node"]


@pytest.mark.parametrize("arguments", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]])
def test_promtool_agrees(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("configuration and alerts are NOT checked by promtool: it is not installed")
    done = subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
