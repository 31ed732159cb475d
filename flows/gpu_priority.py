"""With which priority this process waits for GPUs."""

from __future__ import annotations

import os
import sys

from flows.gpu_queue import PRIORITIES, PRIORITY_VARIABLE, Priority, priority_of


def current_priority() -> Priority:
    """Returns the priority of BIMODE_GPU_PRIORITY, else that of the work queue which the flow run came from.

    Called where the flow itself runs: its stages are runs of their own and came from no queue. Raises ConfigError.
    """
    named = os.environ.get(PRIORITY_VARIABLE)
    if named:
        return priority_of(named)
    queue = _work_queue()
    return priority_of(queue) if queue in PRIORITIES else "default"


def _work_queue() -> str | None:
    context = sys.modules.get("prefect.context")  # where Prefect was not imported, no flow runs
    run = None if context is None else context.FlowRunContext.get()
    return None if run is None or run.flow_run is None else run.flow_run.work_queue_name
