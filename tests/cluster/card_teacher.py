"""The teacher of `benchmarks.cards` as a program, for a host of its own.

python -m tests.cluster.card_teacher --host ADDRESS --port 8000 --log FILE [--latency SECONDS]
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from benchmarks.cards import MODEL, teacher_answer
from teacher.fault_server import EngineModel, FaultServer


def main() -> None:
    """Serves until SIGTERM. Several may append to one log: a line is one write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--latency", type=float, default=0.2)
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = FaultServer(
        teacher_answer,
        models=[MODEL],
        engine=EngineModel(latency_seconds=options.latency),
        host=options.host,
        port=options.port,
        log_path=options.log,
        keep_calls=False,
    )
    with server:
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main()
