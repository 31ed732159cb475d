"""What a run's artifacts say, as plain rows and Markdown; `flows.artifacts` puts it into Prefect's UI.

The UI renders Markdown in descriptions and pages, and one of its two versions in table cells too: an image in a row's
text would have the reader's browser call its address. So every text that comes from data, files or names stands in a
code span, in which nothing is rendered and no address becomes a link.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from corpus.accounting import amount
from corpus.shown_text import percent, plain_text, whole
from corpus.versions import VersionChange
from flows.accounting import duration
from schemas.config import PricesConfig, RunConfig
from schemas.errors import ConfigError
from schemas.fates import StageCount
from schemas.usage import Ledger, cost_of, split_ledger, total_usage

FILES_URL = "BIMODE_FILES_URL"
"""Environment variable of the worker: the address under which the project folder (BIMODE_HOME) is served over HTTP."""

MAX_REASONS = 40
"""Rows of a table of reasons; codes are few, so that more would be a mistake."""
_TEXT_CHARACTERS = 200
_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
_HARMLESS = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 _,()%-]*[A-Za-z0-9)%])?")
_ADDRESS = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]+(?:/[A-Za-z0-9._~/%-]*)?")

Counts = Mapping[str, StageCount]
"""What became of the rows, by stage, in order."""
TableRows = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Example:
    """One quarantined row. file: that names it and all others of its shard."""

    origin: str
    detail: str
    file: Path


# Escaping


def code_span(text: str, limit: int = _TEXT_CHARACTERS) -> str:
    """Returns a text as one line of code in Markdown, cut after `limit` characters; nothing in it is rendered.

    Control characters become U+FFFD; marks that turn the direction of writing go.
    """
    line = " ".join(_DIRECTIONS.sub("", plain_text(text, limit).text).split())
    if not line:
        return "(empty)"
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def cell(text: str) -> str:
    """Returns a text for a cell of a table artifact: as it is where it holds no Markdown, else as code."""
    return text if _HARMLESS.fullmatch(text) else code_span(text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown. Cells are Markdown; a bar in one does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def code_block(text: str) -> str:
    """Returns lines of text as a block of code in Markdown."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def artifact_key(corpus: str, what: str) -> str:
    """Returns the key of an artifact: `sampleworld-funnel`. Prefect allows lower-case letters, digits and dashes."""
    return f"{re.sub('[^a-z0-9]+', '-', corpus.lower()).strip('-') or 'corpus'}-{what}"


# Places


@dataclass(frozen=True, slots=True)
class Places:
    """Where files are for the reader of the UI. home: the project folder. url: its address over HTTP, or None."""

    home: Path
    url: str | None = None

    @classmethod
    def of_environment(cls, home: Path) -> Places:
        """Raises ConfigError: the address in BIMODE_FILES_URL cannot be used."""
        url = os.environ.get(FILES_URL)
        if not url:
            return cls(home)
        if not _ADDRESS.fullmatch(url) or not urlsplit(url).hostname:
            raise ConfigError(f"{FILES_URL} = {url!r} is no address such as http://files.example:8080/bimode")
        return cls(home, url.rstrip("/"))

    def address(self, path: Path | str) -> str | None:
        """Returns the address of a file or folder, or None: nothing is served, or it lies elsewhere."""
        if self.url is None or "://" in str(path):
            return None
        try:
            relative = Path(path).resolve().relative_to(self.home.resolve())
        except ValueError:
            return None
        return f"{self.url}/{quote(relative.as_posix())}"

    def link(self, path: Path | str) -> str:
        """Returns a link in Markdown, or the path as code: browsers open no `file://` link from a page of a server."""
        address = self.address(path)
        return f"[{quote(Path(path).name)}]({address})" if address else code_span(str(path), 1000)


# Tables


def funnel_rows(counts: Counts, titles: Mapping[str, str]) -> TableRows:
    """Returns what became of the rows, a row for each stage so far."""
    num_read = next(iter(counts.values())).num_in if counts else 0
    return [
        {
            "stage": titles.get(stage, stage),
            "rows in": whole(count.num_in),
            "kept": whole(count.num_kept),
            "dropped": whole(count.num_dropped),
            "quarantined": whole(count.num_quarantined),
            "left of all": percent(count.num_kept / num_read) if num_read else "-",
        }
        for stage, count in counts.items()
    ]


def dropped_rows(counts: Counts, titles: Mapping[str, str]) -> TableRows:
    """Returns why rows were dropped, the most frequent reason of each stage first."""
    num_read = next(iter(counts.values())).num_in if counts else 0
    rows = [
        {
            "stage": titles.get(stage, stage),
            "reason": cell(reason),
            "rows": whole(number),
            "of all read": percent(number / num_read),
        }
        for stage, count in counts.items()
        for reason, number in count.dropped.most_common()
    ]
    return rows[:MAX_REASONS]


def cost_rows(paid: Ledger, prices: PricesConfig) -> TableRows:
    """Returns what the run has paid so far, a row for each stage and purpose, and their sum."""
    parts = list(split_ledger(paid, "stage", "purpose").items())
    if len(parts) > 1:
        parts.append((("all", ""), dict(paid)))
    return [_cost_row(stage, purpose, part, prices) for (stage, purpose), part in parts]


def _cost_row(stage: str, purpose: str, part: Ledger, prices: PricesConfig) -> dict[str, str]:
    usage = total_usage(part.values())
    row = {"stage": stage, "purpose": cell(purpose) if purpose else ""}
    if prices.has_any:
        cost = cost_of(part, prices)
        row["cost"] = f"{'' if cost.is_whole else 'at least '}{amount(cost.amount)}"
    return row | {
        "calls": whole(usage.num_calls),
        "replies": whole(usage.num_replies),
        "reused": whole(usage.num_reused),
        "failures": whole(usage.num_failures),
        "prompt tokens": whole(usage.prompt_tokens),
        "completion tokens": whole(usage.completion_tokens),
        "time": duration(usage.wall_seconds),
    }


# Pages


def quarantine_text(
    counts: Counts, examples: Mapping[tuple[str, str], Example], config: RunConfig, places: Places
) -> str:
    """Returns the page about quarantined rows: each reason with an example, and where all of them are.

    examples: by stage and reason.
    """
    num_read = next(iter(counts.values())).num_in if counts else 0
    number = sum(count.num_quarantined for count in counts.values())
    share, limit = (number / num_read if num_read else 0.0), config.max_quarantine_share
    verdict = f"**More than the {percent(limit)} allowed: the run stops.**" if share > limit else ""
    lines = [
        f"{whole(number)} of {whole(num_read)} rows ({percent(share)}) could not be used; a run stops above "
        f"`max_quarantine_share`, {percent(limit)}. {verdict}".rstrip()
    ]
    if number:
        found = [
            (stage, reason, whole(rows), examples.get((stage, reason)))
            for stage, count in counts.items()
            for reason, rows in count.quarantined.most_common()
        ][:MAX_REASONS]
        table = [[stage, cell(reason), rows, _example_line(example)] for stage, reason, rows, example in found]
        lines += ["", markdown_table(["stage", "reason", "rows", "an example"], table), ""]
        files = dict.fromkeys(example.file for _, _, _, example in found if example is not None)
        lines += ["Such files name every row that left, one file for each shard of a stage:", ""]
        lines += [f"- {places.link(file)}" for file in files]
    return "\n".join(lines)


def _example_line(example: Example | None) -> str:
    return "" if example is None else f"{code_span(example.origin)}: {code_span(example.detail)}"


def version_text(record: Mapping[str, Any], changes: VersionChange, summary: str, config: str, places: Places) -> str:
    """Returns the page about the version that a run made or found unchanged.

    record: of the run (`Published.to_record`). summary: the tables of the report as plain text. config: path of the
    configuration, for the commands.
    """
    is_new, version = record["is_new"], str(record["version"])
    num_rows, num_think = int(record["rows"]), int(record["think"])
    facts = [
        ["rows", f"{whole(num_rows)}: {whole(num_think)} think, {whole(num_rows - num_think)} direct"],
        ["change", change_line(changes) if is_new else f"none: {code_span(version)} stays the newest version"],
        ["this run", code_span(str(record["paid"]["text"]), 1000)],
        ["report", places.link(record["report"])],
        ["corpus", places.link(record["corpus"])],
    ]
    commands = [f"bimode show ID --config {shlex.quote(config)}"]
    if changes.base:
        commands.append(f"bimode diff {changes.base} {version} --config {shlex.quote(config)}")
    title = f"# {'New version' if is_new else 'No news:'} {code_span(version)}"
    return "\n\n".join([title, markdown_table(["", ""], facts), code_block("\n".join(commands)), code_block(summary)])


def change_line(changes: VersionChange) -> str:
    """Returns what a version changed, in Markdown."""
    added = (
        f"+{whole(changes.num_added)} rows ({whole(changes.num_added_think)} think, "
        f"{whole(changes.num_added_direct)} direct)"
    )
    if not changes.base:
        return f"starts anew, {added}" + (f"; {code_span(changes.note)}" if changes.note else "")
    line = f"continues {code_span(changes.base)}: {added}"
    if changes.num_vanished:
        line += f", {whole(changes.num_vanished)} marked as gone"
    if changes.num_returned:
        line += f", {whole(changes.num_returned)} back again"
    return line
