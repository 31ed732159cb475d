"""A killing campaign: curations under load are killed at random and at named moments until they are done all the same.

    python -m benchmarks.killing [--kills 200] [--rows 300] [--seed 0]

A program curates the cards of `benchmarks.cards` and is killed with SIGKILL, the whole process group at once, either
after a random time or at a named moment: before and after a sync or a rename, or when an attempt or a compacted file is
made. It is started again in the same work folder until it finishes; then the next folder begins. Two claims are tested:

- Each finished corpus is that of the undisturbed run, byte for byte: shards, fates, and the manifest but for its date,
  the pages and their checksums (pages say when they were made and what this run asked).
- No call asks for a reply that was durable. Right after each kill the journals are read as the next run will read
  them; a later call for a sample (messages and seed) that stands there is a violation, and so is one that asks twice
  within one run. Calls that were in flight at the kill may be repeated, and are counted.

Left out: the loss of what a machine's disk had not written. SIGKILL leaves the page cache as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cards import MODEL, configuration, curate_plainly, table_lines, teacher_answer, write_cards
from corpus.versions import COMPANIONS, FATES, MANIFEST, MARKS, latest_version
from flows.workspace import Workspace
from schemas.config import RunConfig
from schemas.requests import TeacherRequest
from sources import ImageStore
from teacher.crash_points import VARIABLE, reach
from teacher.fault_server import EngineModel, FaultServer
from teacher.fault_server.answers import sha256_of_json
from teacher.images import SentImages
from teacher.journal import JournalRecord, read_journal
from teacher.wire import render_body

_log = logging.getLogger(__name__)

RESULT = Path(__file__).parent / "results" / "killing.json"

RANDOM = "random"
_FREQUENT = (1, 2, 4, 8)
_EACH_SHARD = (1, 2, 4)
SYNC_POINTS = ["journal-before-fsync", "journal-after-fsync"]
JOURNAL_POINTS: Mapping[str, Sequence[int]] = {
    **dict.fromkeys(SYNC_POINTS, _FREQUENT),
    "attempt-created": _EACH_SHARD,
    "attempt-opened": _EACH_SHARD,
    "compact-before-fsync": _EACH_SHARD,
    "compact-after-fsync": _EACH_SHARD,
    "compact-before-rename": _EACH_SHARD,
    "compact-after-rename": _EACH_SHARD,
    "compact-removing": _EACH_SHARD,
    "compact-done": _EACH_SHARD,
}
RENAMED: Mapping[str, Sequence[int]] = {
    "image": _EACH_SHARD,
    "rows": _FREQUENT,
    "marker": _FREQUENT,
    "features": _EACH_SHARD,
    "corpus": (1, 2, 4),
    "manifest": (1,),
    "version": (1,),
    "latest": (1,),
    "ledger": (1,),
}
"""What the pipeline renames into place outside of the journals, and the times of it that a kill is aimed at."""
POINTS: Mapping[str, Sequence[int]] = {
    **JOURNAL_POINTS,
    **{f"{kind}-{when}-rename": times for kind, times in RENAMED.items() for when in ("before", "after")},
}

Asked = tuple[str, int]
"""A sample as the server's log names it: digest of the messages, seed."""


# The program that is killed


def run_killably(config: RunConfig, crash_at: str | None, errors: Path, ready: Connection) -> None:
    """Curates in a process group of its own; the body of the child process.

    crash_at: value of `teacher.crash_points.VARIABLE`. errors: gets what is printed. ready: told once a kill of the
    group hits nobody else.
    """
    os.setsid()
    with errors.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if crash_at is not None:
        os.environ[VARIABLE] = crash_at
    watch_renames()
    ready.send(None)
    curate_plainly(config)


def watch_renames() -> None:
    """Makes every rename of this process a named moment, before and after: see `RENAMED`."""

    def watched(move: Callable[[str | Path, str | Path], None]) -> Callable[[str | Path, str | Path], None]:
        def move_watched(source: str | Path, target: str | Path) -> None:
            kind = renamed_kind(Path(target))
            reach(f"{kind}-before-rename")
            move(source, target)
            reach(f"{kind}-after-rename")

        return move_watched

    os.replace, os.rename = watched(os.replace), watched(os.rename)  # type: ignore[assignment]


def renamed_kind(target: Path) -> str:
    """Returns what of `RENAMED` a file or folder is, by its place in the work folder; other things are "other"."""
    if target.suffix == ".img":
        return "image"
    if target.name in {"published.json", "latest", MANIFEST}:
        return {"published.json": "ledger", MANIFEST: "manifest"}.get(target.name, target.name)
    if target.suffix == "" and target.parent.name == "corpus":
        return "version"
    if ".building" in target.parts:
        return "corpus"
    if "stages" in target.parts:
        return {".json": "marker", ".parquet": "rows"}.get(target.suffix, "features")
    return "other"


# What was asked, and what was paid for


class CallLedger:
    """What the runs in one work folder asked for, by the server's log, beside what was durable when they were killed.

    num_repeated: samples asked for again, as their reply was not durable at a kill. violations: what must not happen.
    num_believed: durable replies found at the ends of runs, summed up. num_in_flight: per kill, the samples that the
    killed run had asked for and whose reply was not durable.
    """

    def __init__(self, log: Path, config: RunConfig, names: SampleNames) -> None:
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0
        self._workspace = Workspace(config.workdir)
        self._names = names
        self._asked_before: set[Asked] = set()
        self._asked_now: set[Asked] = set()
        self._durable: set[Asked] = set()
        self.num_calls = 0
        self.num_samples = 0
        self.num_repeated = 0
        self.num_believed = 0
        self.num_in_flight: list[int] = []
        self.violations: list[str] = []

    def note_end(self, *, was_killed: bool) -> None:
        """To be called when a run has ended and nothing of it is on its way to the server any more."""
        for call in self._new_calls():
            self.num_calls += 1
            for choice in range(call["n"]):
                self._note_sample((call["question"], call["seed"] + choice), call)
        believed = self._names.of(self._believed())
        unknown = believed - self._asked_now - self._asked_before
        assert not unknown, f"{len(unknown)} stored replies were never asked for, by the names of the log"
        self.num_believed += len(believed)
        self.violations += ["a reply that was durable at a kill is gone"] * len(self._durable - believed)
        self._durable |= believed
        if was_killed:
            self.num_in_flight.append(len(self._asked_now - believed))
        self._asked_before |= self._asked_now
        self._asked_now = set()

    def _note_sample(self, name: Asked, call: Mapping[str, Any]) -> None:
        self.num_samples += 1
        what = f"{call['purpose']}, sample {call['index']}"
        if name in self._durable:
            self.violations.append(f"{what} was asked for again, although its reply was durable")
        elif name in self._asked_now:
            self.violations.append(f"{what} was asked for twice by one run")
        elif name in self._asked_before:
            self.num_repeated += 1
        self._asked_now.add(name)

    def _new_calls(self) -> Iterator[dict[str, Any]]:
        with self._log.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                self._offset += len(line)
                yield json.loads(line)

    def _believed(self) -> Iterator[JournalRecord]:
        for folder in sorted((self._workspace.root / "journals").glob("*/*")):
            yield from read_journal(folder)


class SampleNames:
    """Names stored replies as the server's log does: by the digest of the messages as they were sent, and the seed."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._known: dict[str, Asked] = {}

    def of(self, records: Iterator[JournalRecord]) -> set[Asked]:
        return asyncio.run(self._of(records))

    async def _of(self, records: Iterator[JournalRecord]) -> set[Asked]:
        images = ImageStore(Workspace(self._config.workdir).images, self._config.images)
        sent = SentImages(self._config.teacher, images.resized_bytes, None)
        named = set()
        for record in records:
            if record.key not in self._known:
                self._known[record.key] = await self._name(record, sent)
            named.add(self._known[record.key])
        return named

    async def _name(self, record: JournalRecord, sent: SentImages) -> Asked:
        assert record.sampling is not None and record.seed is not None
        request = TeacherRequest(
            record.sample_id, record.purpose, record.messages, record.sampling, record.seed, record.index
        )
        images = await sent.of_request(request)
        body = render_body(request, model=MODEL, images=images, extra_body={})
        return sha256_of_json(body["messages"]).hex(), record.seed


def corpus_fingerprint(version: Path) -> dict[str, str]:
    """Returns the sha256 of all that must be equal, by name: shards, fates, and the manifest without its date.

    The pages and their checksums are left out: they say when they were made, and how many calls this run made.
    """
    files = [*sorted((version / "data").rglob("*.parquet")), version / FATES]
    digests = {path.relative_to(version).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = json.loads((version / MANIFEST).read_text(encoding="utf-8"))
    for name in ("created", "checksum"):
        del manifest[name]
    for change in manifest["history"]:
        del change["created"]
    pages = set(COMPANIONS) - {FATES, MARKS}
    manifest["files"] = [file for file in manifest["files"] if file["path"] not in pages]
    digests[MANIFEST] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return digests


# The campaign


@dataclass(frozen=True, slots=True)
class Kill:
    """When a run is to be killed: at a named moment (a value of `teacher.crash_points.VARIABLE`), or after a time."""

    kind: str
    crash_at: str | None = None
    after_seconds: float | None = None


NO_KILL = Kill("none")


@dataclass(slots=True)
class Findings:
    """What a campaign saw. num_finished: corpora that were compared; different: names of files that differ."""

    calm_seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    num_starts: int = 0
    num_finished: int = 0
    num_unreached: int = 0
    different: list[str] = field(default_factory=list)
    num_calls: int = 0
    num_samples: int = 0
    num_repeated: int = 0
    num_believed: int = 0
    num_in_flight: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def add(self, ledger: CallLedger) -> None:
        self.num_calls += ledger.num_calls
        self.num_samples += ledger.num_samples
        self.num_repeated += ledger.num_repeated
        self.num_believed += ledger.num_believed
        self.num_in_flight += ledger.num_in_flight
        self.violations += ledger.violations


class Campaign:
    """Curations of the same cards in one folder after the other, killed until they are done.

    folder: everything is written below it. The server runs in this process, which nobody kills.
    """

    def __init__(self, folder: Path, server: FaultServer, *, num_rows: int, seed: int) -> None:
        assert server.log_path is not None
        self._folder, self._server, self._log = folder, server, server.log_path
        self._cards = write_cards(folder / "cards", num_rows)
        self._rng = random.Random(seed)
        # The sync of replies is what all rests on, so every round through the points comes by it several times.
        points = [*POINTS, *3 * SYNC_POINTS]
        self._points: list[str] = self._rng.sample(points, len(points))
        # Forked from a process that has imported everything: a start costs no seconds, and each is a new process.
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["flows.curate", "benchmarks.cards"])

    def run(self, num_kills: int) -> Findings:
        """Kills so often, lets the last run finish, and returns what was seen."""
        self._start(self._configuration("warm"), NO_KILL)  # the first start of all compiles
        calm = self._configuration("calm")
        began = time.monotonic()
        self._start(calm, NO_KILL)
        findings = Findings(time.monotonic() - began)
        reference, names = self._fingerprint(calm), SampleNames(calm)
        while findings.kills.total() < num_kills:
            findings.num_finished += 1
            config = self._configuration(f"run-{findings.num_finished}")
            ledger = CallLedger(self._log, config, names)
            self._finish_despite_kills(config, ledger, findings, num_kills)
            findings.add(ledger)
            found = self._fingerprint(config)
            differing = {name for name, _ in reference.items() ^ found.items()}
            findings.different += [f"run {findings.num_finished}: {name}" for name in sorted(differing)]
            shutil.rmtree(config.workdir)
            _log.info("%d corpora, %d kills", findings.num_finished, findings.kills.total())
        return findings

    def _finish_despite_kills(self, config: RunConfig, ledger: CallLedger, findings: Findings, num_kills: int) -> None:
        was_killed = True
        while was_killed:
            kill = self._draw_kill(findings) if findings.kills.total() < num_kills else NO_KILL
            was_killed = self._start(config, kill)
            self._wait_until_quiet()
            ledger.note_end(was_killed=was_killed)
            findings.num_starts += 1
            findings.kills.update([kill.kind] * was_killed)
            findings.num_unreached += kill.crash_at is not None and not was_killed

    def _draw_kill(self, findings: Findings) -> Kill:
        # In turns: a run may end before its random moment, and then kills at named points would become the most.
        if 2 * findings.kills[RANDOM] <= findings.kills.total():
            return Kill(RANDOM, after_seconds=self._rng.uniform(0.0, findings.calm_seconds))
        point = self._points.pop(0)
        self._points.append(point)
        return Kill(point, crash_at=f"{point}:{self._rng.choice(POINTS[point])}")

    def _configuration(self, name: str) -> RunConfig:
        workdir = self._folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        return configuration(self._cards, workdir, self._server.url)

    def _start(self, config: RunConfig, kill: Kill) -> bool:
        """Runs the program until it ends or is killed; returns whether it was killed."""
        errors = self._folder / "errors.txt"
        errors.unlink(missing_ok=True)
        heard, told = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=run_killably, args=(config, kill.crash_at, errors, told))
        process.start()
        told.close()
        heard.recv()
        process.join(kill.after_seconds)
        if process.is_alive():
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode not in {0, -signal.SIGKILL}:
            raise AssertionError(f"the curation ended with {process.exitcode}:\n{errors.read_text('utf-8')[-3000:]}")
        return process.exitcode != 0

    def _wait_until_quiet(self) -> None:
        """Waits until the server has read what a dead program had sent."""
        before = -1
        while before != self._server.num_calls or self._server.num_in_flight:
            before = self._server.num_calls
            time.sleep(0.05)

    def _fingerprint(self, config: RunConfig) -> dict[str, str]:
        version = latest_version(Path(config.workdir) / "corpus")
        assert version is not None, "a finished run has published a corpus"
        return corpus_fingerprint(version)


def run_campaign(folder: Path, *, num_kills: int, num_rows: int, seed: int, latency_seconds: float = 0.06) -> Findings:
    """Runs a campaign below a folder, server included. latency_seconds: the median until an answer's first token."""
    log = folder / "calls.jsonl"
    engine = EngineModel(latency_seconds, latency_shape="lognormal", latency_spread=0.8, max_sequences=32)
    with FaultServer(teacher_answer, models=[MODEL], engine=engine, log_path=log, keep_calls=False) as server:
        return Campaign(folder, server, num_rows=num_rows, seed=seed).run(num_kills)


def render(findings: Findings) -> str:
    """Returns the findings as text for a terminal."""
    named = {point: number for point, number in findings.kills.items() if point != RANDOM}
    mean_in_flight = sum(findings.num_in_flight) / max(1, len(findings.num_in_flight))
    lines = table_lines(
        [
            ("kills", findings.kills.total()),
            ("  at random moments", findings.kills[RANDOM]),
            *((f"  at {point}", number) for point, number in sorted(named.items())),
            ("starts", findings.num_starts),
            ("  that finished before their named moment came", findings.num_unreached),
            ("corpora finished and compared", findings.num_finished),
            ("  files that differ from the undisturbed run's", len(findings.different)),
            ("calls", findings.num_calls),
            ("samples asked for", findings.num_samples),
            ("  again, as they were in flight at a kill", findings.num_repeated),
            ("durable replies found after runs, in all", findings.num_believed),
            ("samples in flight at a kill, mean", f"{mean_in_flight:.1f}"),
            ("kills with samples in flight", sum(map(bool, findings.num_in_flight))),
            ("violations", len(findings.violations)),
        ]
    )
    return "\n".join([*lines, *findings.different[:20], *findings.violations[:20]])


def record_of(findings: Findings, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what is kept of a campaign."""
    return {
        "command": f"python -m benchmarks.killing --kills {options.kills} --rows {options.rows} --seed {options.seed}",
        "kills": {"all": findings.kills.total(), **dict(sorted(findings.kills.items()))},
        "starts": findings.num_starts,
        "corpora_compared": findings.num_finished,
        "files_that_differ": len(findings.different),
        "calls": findings.num_calls,
        "samples_asked_for": findings.num_samples,
        "samples_asked_for_again_in_flight": findings.num_repeated,
        "kills_with_samples_in_flight": sum(map(bool, findings.num_in_flight)),
        "durable_replies_found": findings.num_believed,
        "violations": len(findings.violations),
    }


def main() -> int:
    """Returns 1 if a corpus differed or a durable reply was paid for again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=300, help="cards in each curation")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.INFO)
    _log.propagate = False
    with tempfile.TemporaryDirectory(prefix="bimode-killing-") as folder:
        findings = run_campaign(Path(folder), num_kills=options.kills, num_rows=options.rows, seed=options.seed)
    print(render(findings))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record_of(findings, options), indent=2) + "\n", encoding="utf-8")
    return 1 if findings.different or findings.violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
