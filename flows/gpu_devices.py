"""Which GPUs this worker may take, and the folder in which they are leased.

A GPU is a local thing: whoever can use it can also see one folder of its host. There each has a file, named by what is
the same for all who see the GPU: its UUID, as containers number theirs anew; its index where no UUID is known.

A machine without GPUs has one virtual device, `cpu`, so that serving and training are kept apart there too. It lies in
the project's own folder: a processor, other than a GPU, is shared between projects.

BIMODE_GPUS: names of GPUs, such as `0,1,2,3`, in place of those that nvidia-smi finds: for GPUs of other makers, and
as a stand-in where there are none (the tests of leases and queues use it so). BIMODE_GPU_LEASES: another folder. It
must lie on a disk or in memory of this host, not on a network, and be the same for all that use these GPUs.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import ConfigError, StorageError
from teacher.parallelism import find_gpus

GPUS_VARIABLE = "BIMODE_GPUS"
LEASES_VARIABLE = "BIMODE_GPU_LEASES"
CPU = "cpu"
_LOCKS = Path("/run/lock")
"""Of the host, in memory, writable for all, empty after a start: where lock files belong on Linux."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class Device:
    """Something that only one may use. key: its name on this host. index: its name in CUDA_VISIBLE_DEVICES."""

    key: str
    index: str

    @property
    def is_gpu(self) -> bool:
        return self.index != CPU

    def __str__(self) -> str:
        return f"GPU {self.index}" if self.is_gpu else "the processor"


@dataclass(frozen=True, slots=True)
class GpuHost:
    """The devices of this host that this process may use, in order, and the folder in which they are leased."""

    folder: Path
    devices: tuple[Device, ...]

    @property
    def num_gpus(self) -> int:
        return sum(device.is_gpu for device in self.devices)

    @classmethod
    def here(cls, home: Path) -> GpuHost:
        """Returns what this process finds. home: the project folder, for the leases of a machine without GPUs.

        Raises ConfigError: BIMODE_GPUS cannot be read.
        """
        devices = find_devices()
        chosen = os.environ.get(LEASES_VARIABLE)
        if chosen:
            return cls(Path(chosen), devices)
        if not devices[0].is_gpu:
            return cls(home / ".local" / "gpus", devices)
        return cls((_LOCKS if _LOCKS.is_dir() else Path(tempfile.gettempdir())) / "bimode-gpus", devices)


def find_devices() -> tuple[Device, ...]:
    """Returns the GPUs that this process may use, or the virtual device where there are none. Raises ConfigError."""
    named = os.environ.get(GPUS_VARIABLE)
    if named is not None:
        devices = _named_devices(named)
    else:
        devices = tuple(Device(gpu.uuid or gpu.index, gpu.index) for gpu in find_gpus())
    return devices or (Device(CPU, CPU),)


def _named_devices(text: str) -> tuple[Device, ...]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [name for name in names if not _NAME.fullmatch(name)]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(f"{GPUS_VARIABLE} = {text!r} is no list of different names, such as 0,1,2,3")
    return tuple(Device(name, name) for name in names)


def visible_to(devices: Sequence[Device]) -> dict[str, str]:
    """Returns the environment in which a program sees these devices alone; empty for the virtual one."""
    gpus = [device.index for device in devices if device.is_gpu]
    # CUDA numbers GPUs by speed by default, nvidia-smi by slot: one numbering for both.
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if gpus else {}


def make_folder(folder: Path) -> None:
    """Makes the folder of leases; where all users of the host may write, they may in it. Raises StorageError."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        if folder.stat().st_uid == os.getuid() and folder.parent.stat().st_mode & stat.S_ISVTX:
            folder.chmod(0o1777)  # a GPU is free or taken whoever asks
    except OSError as error:
        raise StorageError(
            f"cannot use the folder of GPU leases {folder}: {error.strerror}; {LEASES_VARIABLE} names another one"
        ) from error
