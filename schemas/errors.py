"""Every error the project raises on purpose, as one tree.

A `BimodeError` is written for the person who runs the pipeline: it names what failed, the value seen and what to do.
Programs print it without a traceback and exit with `exit_code`. Errors that concern one row never leave their stage:
they become a quarantined row (see `schemas.fates`).
"""

from __future__ import annotations

import sys
from typing import Any


class BimodeError(Exception):
    """Base of all errors meant for the user. `exit_code` is the process exit status of the command line."""

    exit_code = 1


class ConfigError(BimodeError):
    """The run configuration cannot be used: unknown key, wrong type, missing file, contradiction."""

    exit_code = 2


class SourceError(BimodeError):
    """A whole source cannot be read: missing file, missing column, corrupt container."""

    exit_code = 3


class TeacherError(BimodeError):
    """The teacher endpoint cannot be used at all, so asking further rows would be useless."""

    exit_code = 4


class TeacherUnreachable(TeacherError):
    """No endpoint answered although every retry was spent."""


class TeacherMisconfigured(TeacherError):
    """The endpoint answers but refuses the set-up: wrong model name, wrong path, no permission."""


class ServingError(TeacherError):
    """vLLM could not be started on this machine; the message quotes the end of its log."""


class QuarantineExceeded(BimodeError):
    """More rows were quarantined than the configuration allows: the input or the set-up is wrong."""

    exit_code = 5


class StorageError(BimodeError):
    """Reading or writing the work folder failed: full disk, no permission, damaged file."""

    exit_code = 6


class CorpusError(BimodeError):
    """A corpus version is incomplete, altered or cannot be written."""

    exit_code = 7


class TrainingError(BimodeError):
    """A training program cannot go on: missing checkpoint, empty corpus, loss that is not finite."""

    exit_code = 8


class Interrupted(BimodeError):
    """A signal asked a program to stop; what it had done is kept, and the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class RowError(Exception):
    """One row cannot be used. Carries the reason code under which the row is quarantined.

    reason: short snake_case code, stable, counted in reports (e.g. "image_unreadable").
    detail: one sentence for a person, naming the value seen.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def storage_failures() -> tuple[type[Exception], ...]:
    """Returns what file systems raise: OSError, an unknown protocol or a missing library, and what botocore adds.

    Wrong or missing credentials and an endpoint that cannot be reached are no OSErrors in botocore. It is looked at
    only where s3fs has loaded it.
    """
    botocore: Any = sys.modules.get("botocore.exceptions")
    extra = () if botocore is None else (botocore.BotoCoreError, botocore.ClientError)
    return (OSError, ImportError, ValueError, *extra)
