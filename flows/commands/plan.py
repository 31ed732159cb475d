"""`bimode plan`: what a curation will take, before there is data for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import JsonOption, examples, print_json, user_errors
from schemas.errors import ConfigError

if TYPE_CHECKING:
    from flows.planning.plan import Plan
    from flows.planning.request import Machines, Request
    from schemas.config import RunConfig

EXAMPLES = examples(
    "bimode plan --rows 16400000 --gpus 8 --gpu-hour-price 2.5",
    "bimode plan --rows 1000000 --gpus 2 --model Qwen/Qwen2.5-VL-7B-Instruct --explain",
    "bimode plan --config my.yaml --from runs/my-corpus --rows 16400000 --gpus 64 --nightly-rows 100000",
    "bimode plan --rows 1000000000 --gpus 64 --simulate",
)


def plan(
    rows: Annotated[int, typer.Option(help="Raw rows to read.")],
    gpus: Annotated[int, typer.Option(help="GPUs for the teacher.")],
    gpu: Annotated[str, typer.Option(help="Their kind: H100, H200, A100 or L40S.")] = "H100",
    model: Annotated[
        str | None,
        typer.Option(help="The teacher: a known model, or a folder of weights; the configuration's by default."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Take settings, prices and what the sources settle from this file.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--from", help="Take shares and lengths from a finished run: a version, or its work folder."),
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(help="Price of an hour of one GPU, in any currency; the configuration's by default.")
    ] = None,
    cores: Annotated[
        int | None, typer.Option(help="Processor cores for the pipeline; four per GPU by default.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes of the pipeline: 1 without Ray, with it those of all workers.")
    ] = 1,
    memory_gib: Annotated[float, typer.Option(help="Memory of the driver's host in GiB.")] = 256.0,
    nightly_rows: Annotated[int, typer.Option(help="Say, too, what a night costs that adds so many rows.")] = 0,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run the schedule, too: shards through stages, with recorded latencies.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every assumption with its source, and how the speed follows.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a curation will take: calls, tokens, hours, storage, money, and what breaks first.

    Nothing is read or asked. Shares and lengths are the paper's, or those of a finished run; speed follows from the
    GPUs' data sheets. For a given set of rows, `bimode curate --dry-run` counts.
    """
    with user_errors():
        from flows.planning.plan import plan_run  # noqa: PLC0415 - takes seconds to import
        from flows.planning.rendering import render_explanation, render_plan  # noqa: PLC0415

        if nightly_rows < 0 or seed < 0:
            raise ConfigError(f"--nightly-rows {nightly_rows} and --seed {seed} must not be negative")
        settings = _settings(config, model, gpu_hour_price)
        machines = _machines(gpus, cores, processes, memory_gib)
        request = _request(rows, gpus, gpu, machines, settings, measured, is_own=config is not None)
        planned = plan_run(request)
        nightly = plan_run(replace(request, num_rows=nightly_rows)) if nightly_rows else None
        if as_json:
            print_json(_record(planned, nightly, simulate=simulate, seed=seed))
            return
        print(render_plan(planned, nightly))
        if simulate:
            print()
            print(_simulated(planned, seed))
        if explain:
            print()
            print(render_explanation(planned))


def _settings(config: Path | None, model: str | None, gpu_hour_price: float | None) -> RunConfig:
    """Returns the settings to plan with. Raises ConfigError."""
    from flows.planning.request import DEFAULT_CONFIG  # noqa: PLC0415
    from flows.run_config import load_run  # noqa: PLC0415

    settings = DEFAULT_CONFIG if config is None else load_run(str(config))
    if model is not None:
        serve = settings.serve and settings.serve.model_copy(update={"model_path": None})
        teacher = settings.teacher.model_copy(update={"model": model})
        settings = settings.model_copy(update={"teacher": teacher, "serve": serve})
    if gpu_hour_price is not None:
        if not 0 <= gpu_hour_price < math.inf:
            raise ConfigError(f"--gpu-hour-price {gpu_hour_price} must be a number from 0")
        prices = settings.prices.model_copy(update={"gpu_hour": gpu_hour_price, "models": {}})
        settings = settings.model_copy(update={"prices": prices})
    return settings


def _machines(gpus: int, cores: int | None, processes: int, memory_gib: float) -> Machines:
    """Returns what stands beside the GPUs. Raises ConfigError."""
    from flows.planning.request import Machines  # noqa: PLC0415

    for option, value in (("cores", cores), ("processes", processes), ("memory-gib", memory_gib)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{option} {value} must be a positive number")
    beside = Machines.beside(max(1, gpus))
    return replace(
        beside, num_cores=cores or beside.num_cores, num_processes=processes, memory_bytes=memory_gib * 2**30
    )


def _request(
    rows: int, gpus: int, gpu: str, machines: Machines, settings: RunConfig, measured: Path | None, *, is_own: bool
) -> Request:
    """Returns what is planned. Raises ConfigError, and CorpusError: the finished run's manifest is damaged."""
    from flows.planning.gpus import gpu_kind  # noqa: PLC0415
    from flows.planning.measured import measured_run  # noqa: PLC0415
    from flows.planning.request import Request  # noqa: PLC0415

    asked = {endpoint.model for endpoint in (*settings.difficulty_endpoints, settings.reasoner_endpoint)}
    elsewhere = frozenset(asked - {settings.teacher.model})
    request = Request(rows, gpus, gpu_kind(gpu), machines, settings, is_own, elsewhere=elsewhere)
    if measured is None:
        return request
    found = measured_run(measured, settings, request.assumptions)
    return replace(request, assumptions=found.assumptions, sampling=found.sampling)


def _record(planned: Plan, nightly: Plan | None, *, simulate: bool, seed: int) -> dict[str, object]:
    from flows.planning.limits import limits  # noqa: PLC0415
    from flows.planning.schedule import schedule_of  # noqa: PLC0415
    from flows.planning.simulation import simulate_schedule  # noqa: PLC0415

    record = planned.to_record() | {"limits": [limit.to_record() for limit in limits(planned)]}
    if nightly is not None:
        record["nightly"] = nightly.to_record()
    if simulate:
        record["simulation"] = simulate_schedule(schedule_of(planned, seed=seed)).to_record()
    return record


def _simulated(planned: Plan, seed: int) -> str:
    from flows.planning.schedule import schedule_of  # noqa: PLC0415
    from flows.planning.schedule_text import render_schedule  # noqa: PLC0415
    from flows.planning.simulation import simulate_schedule  # noqa: PLC0415

    schedule = schedule_of(planned, seed=seed)
    return render_schedule(schedule, simulate_schedule(schedule))
