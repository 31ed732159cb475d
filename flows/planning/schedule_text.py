"""A simulated schedule as text for a terminal."""

from __future__ import annotations

from flows.commands.terminal import columns
from flows.planning.rendering import short
from flows.planning.schedule import Schedule
from flows.planning.simulation import Outcome


def render_schedule(schedule: Schedule, outcome: Outcome) -> str:
    """Returns what the simulation saw, stage by stage."""
    resources = list(outcome.stages[0].loads)
    rows = [
        [
            stage.name,
            stage.saturated,
            short(stage.seconds / 3600),
            short(stage.least_seconds / 3600),
            *(f"{stage.loads[name]:.0%}" for name in resources),
        ]
        for stage in outcome.stages
    ]
    header = ["stage", "used most", "hours", "at least", *resources]
    return "\n".join(
        [
            f"Simulated, seed {schedule.seed}: {schedule.num_shards:,} shards, {schedule.num_workers} tasks at once "
            f"with {schedule.num_lanes} shard(s) each, {schedule.num_copies:g} copies of the model.",
            "",
            *columns(header, rows, num_left=2),
            "",
            f"{outcome.seconds / 3600:,.1f} hours, {outcome.least_seconds / outcome.seconds:.1%} of which no schedule "
            f"could avoid; {outcome.num_copies_lost:,} copies of the model and {outcome.num_workers_lost:,} workers "
            "were lost on the way.",
        ]
    )
