"""The GPUs of a training run: leased once for all its programs, and given back as fewer are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flows.gpu_devices import GpuHost
from flows.gpu_lease import Lease, Leases, Terms
from flows.gpu_priority import current_priority
from flows.gpu_queue import Request
from flows.processes import Report
from flows.supervisor import KILL_SECONDS
from flows.teacher_lease import Drain, refuse
from flows.training_plan import Step, TrainingPlan
from schemas.training_config import TrainingConfig


def num_gpus(step: Step, config: TrainingConfig) -> int:
    """Returns how many GPUs a program takes: one for each of its processes; none if it asks an endpoint."""
    if step.program == "evaluate":
        return 0 if "url" in step.settings else 1
    return config.launch.num_processes


@contextmanager
def leased_gpus(plan: TrainingPlan, name: str, say: Report) -> Iterator[Lease | None]:
    """Holds as many GPUs as the largest program that is still to run needs; yields None where none is needed.

    They are held from the first program to the last: a run that gave them back in between would wait for its second
    half behind all that has come since. name: of the run, for those who wait.

    Raises ConfigError: there are not so many. GpusTaken: the teacher has them and must not be stopped. Others as
    `Leases.acquire`.
    """
    config = plan.config
    most = max((num_gpus(step, config) for step in plan.selected if step.result() is None), default=0)
    if most == 0:
        yield None
        return
    leases = Leases(GpuHost.here(plan.home))
    keys = tuple(device.key for device in leases.host.devices)
    number = most if leases.host.num_gpus else 1  # processes share a processor
    request = Request("training", f"{config.name}, flow run {name}", keys, number, current_priority())
    make_room = Drain(leases, say, restart=config.restart_teacher) if config.release_teacher else refuse
    # After a kill, the supervisor gives its program this long.
    terms = Terms(stop_seconds=config.stop_seconds + KILL_SECONDS)
    with leases.acquire(request, terms, say=say, make_room=make_room) as lease:
        say(f"training has {', '.join(map(str, lease.devices))}")
        yield lease


def fit(gpus: Lease, step: Step, plan: TrainingPlan) -> None:
    """Gives back the GPUs that neither this program nor a later one needs."""
    later = plan.selected[plan.selected.index(step) :]
    gpus.keep(max(num_gpus(each, plan.config) for each in later if each.result() is None))
