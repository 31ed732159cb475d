"""The plans of two scales, simulated, and the measurements that plans rest on.

    python -m benchmarks.planning               # 16.4 million and a billion rows on 8 and on 64 H100
    python -m benchmarks.planning --measure     # processor time and bytes by stage; Prefect's time and bytes a task
    python -m benchmarks.planning --record --journals runs/demo/journals --answers mathvision/responses.jsonl

The first takes seconds and needs nothing. The second curates rows with photographs of their own against a teacher that
answers at once, in one process, and counts the seconds of its processors by stage; the teacher's are left out. The
third makes `flows/planning/recorded_latencies.json` anew from calls to a real vLLM and from answers of real models.
Results are written to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.planning_rates import measure_prefect, measure_stages, record_spread
from flows.commands.terminal import columns
from flows.planning.gpus import gpu_kind
from flows.planning.latencies import FILE
from flows.planning.limits import limits
from flows.planning.plan import Plan, plan_run, plan_with_settings
from flows.planning.rendering import ranged, short
from flows.planning.request import DEFAULT_CONFIG, MAX_TASKS, Machines, Request
from flows.planning.schedule import schedule_of
from flows.planning.simulation import Outcome, simulate_schedule

RESULTS = Path(__file__).parent / "results"
SCALES = (16_400_000, 1_000_000_000)
GPUS = (8, 64)
CORES_PER_RAY_TASK = 2


def _ray_processes(num_gpus: int) -> int:
    """Returns how many tasks of Ray the cores beside so many GPUs do at once."""
    return min(MAX_TASKS, Machines.beside(num_gpus).num_cores // CORES_PER_RAY_TASK)


def plan_scale(num_rows: int, num_gpus: int, processes: int, *, is_default: bool = False) -> Plan:
    """Returns a plan; is_default: with the configuration's defaults instead of the settings that serve it best."""
    machines = replace(Machines.beside(num_gpus), num_processes=processes)
    request = Request(num_rows, num_gpus, gpu_kind("H100"), machines, DEFAULT_CONFIG, is_own=False)
    if is_default:
        return plan_with_settings(request, DEFAULT_CONFIG.parallel_shards)
    return plan_run(request)


def compare_scales() -> list[dict[str, Any]]:
    """Prints every scale and returns its record."""
    records, rows = [], []
    for num_rows in SCALES:
        for num_gpus in GPUS:
            for processes in (1, _ray_processes(num_gpus)):
                for is_default in (True, False):
                    plan = plan_scale(num_rows, num_gpus, processes, is_default=is_default)
                    outcome = simulate_schedule(schedule_of(plan))
                    records.append(_record(plan, outcome, is_default=is_default))
                    rows.append(_cells(plan, outcome, is_default=is_default))
    header = ["rows", "GPUs", "pipeline", "shards", "GPU hours", "days, planned", "days, simulated", "GPUs used"]
    print("\n".join(columns([*header, "first limit"], rows, num_left=0)))
    return records


def _cells(plan: Plan, outcome: Outcome, *, is_default: bool) -> list[str]:
    first = limits(plan)[0]
    settings = f"{plan.setup.num_parallel} x {plan.request.config.shard_rows:,}" + (" (default)" if is_default else "")
    return [
        short(plan.request.num_rows),
        str(plan.layout.num_gpus),
        f"Ray, {plan.request.machines.num_processes}" if plan.request.is_ray else "one process",
        settings,
        ranged(plan.gpu_seconds / 3600),
        ranged(plan.wall_seconds / 86400),
        short(outcome.seconds / 86400),
        f"{_gpu_use(plan, outcome):.0%}",
        f"{first.name} {first.load:.1%}",
    ]


def _gpu_use(plan: Plan, outcome: Outcome) -> float:
    """Returns the share of the GPUs' time that the plan's work takes, from the first stage to the last."""
    return float(plan.gpu_seconds[0]) / (outcome.seconds * plan.layout.num_copies * plan.layout.tensor)


def _record(plan: Plan, outcome: Outcome, *, is_default: bool) -> dict[str, Any]:
    record = {name: value for name, value in plan.to_record().items() if name != "assumptions"}
    return {
        **record,
        "is_default": is_default,
        "limits": [limit.to_record() for limit in limits(plan)],
        "simulation": outcome.to_record() | {"gpu_use": _gpu_use(plan, outcome)},
    }


def write_results(name: str, record: Mapping[str, Any] | Sequence[Any]) -> None:
    path = RESULTS / name
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(RESULTS.parents[1])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rows", type=int, nargs=2, default=[300, 1000], help="rows that --measure curates, twice")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--journals", type=Path, help="of a finished run on a real vLLM")
    parser.add_argument("--answers", type=Path, help="recorded answers of real models, JSON Lines")
    options = parser.parse_args()
    if options.record:
        if options.journals is None or options.answers is None:
            parser.error("--record needs --journals and --answers")
        path = Path(__file__).parents[1] / "flows" / "planning" / FILE
        path.write_text(json.dumps(record_spread(options.journals, options.answers), indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.name}")
    elif options.measure:
        write_results("planning_rates.json", {"stages": measure_stages(options.rows), "prefect": measure_prefect()})
    else:
        write_results("planning.json", compare_scales())


if __name__ == "__main__":
    main()
