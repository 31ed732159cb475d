"""Watching a run: its log, its traces and its metrics, behind a few calls.

    with telemetry.run(runtime, run_id=...):                      a run, in the process that makes it
        with telemetry.stage(stage, progress) as seen:            a stage of it
            calls = telemetry.watched(calls)                      each shard's call, watched wherever it is done
            seen.count(markers)                                   what became of its rows
    enter_row(sample_id)                                          one row, in its own task (`schemas.context`)

All is off unless the environment asks for it (`flows.telemetry.settings`, docs/observability.md), and outside `run`
these calls do nothing.
"""

from flows.telemetry.logs import library_logs_shown
from flows.telemetry.watching import WatchedRun, WatchedStage, run, stage, watched

__all__ = ["WatchedRun", "WatchedStage", "library_logs_shown", "run", "stage", "watched"]
