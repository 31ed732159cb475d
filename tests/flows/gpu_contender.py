"""A process that wants stand-in GPUs, for the tests of leases: it takes them, notes what it saw, and gives them back.

The journal of the folder gets a line when the GPUs are taken and one before they are given back. Meanwhile there is a
file `busy-GPU` for each, which only one can make: a second holder fails. One of a holder that was killed is removed by
whoever finds that its process has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from flows.gpu_devices import Device, GpuHost
from flows.gpu_lease import Leases
from flows.gpu_queue import Priority, Request


def note(folder: Path, event: str, name: str, gpus: list[str]) -> None:
    line = json.dumps({"event": event, "name": name, "gpus": gpus, "pid": os.getpid()}) + "\n"
    descriptor = os.open(folder / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def occupy(path: Path) -> None:
    """Marks a GPU as in use. Raises FileExistsError: a living process uses it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        if not Path(f"/proc/{int(path.read_text())}").exists():
            path.unlink()
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(str(os.getpid()))
    try:
        os.link(new, path)
    finally:
        new.unlink()


def contend(folder: Path, num_gpus: int, wanted: int, hold: float, priority: Priority, name: str) -> None:
    """num_gpus: that there are. hold: seconds."""
    host = GpuHost(folder / "leases", tuple(Device(str(index), str(index)) for index in range(num_gpus)))
    request = Request("training", name, tuple(device.key for device in host.devices), wanted, priority)
    with Leases(host).acquire(request, say=lambda line: None) as lease:
        gpus = [device.key for device in lease.devices]
        marks = [folder / f"busy-{gpu}" for gpu in gpus]
        for mark in marks:
            occupy(mark)
        note(folder, "taken", name, gpus)
        time.sleep(hold)
        note(folder, "given back", name, gpus)
        for mark in marks:
            mark.unlink()
