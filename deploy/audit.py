"""Looks every pinned package up in OSV's advisory database: `python deploy/audit.py`, or `make audit`.

pip-audit asks, lock by lock; nothing is installed or resolved, for the locks hold exact versions. An advisory that was
looked into and does not concern us goes into ACCEPTED, with the reason and a day after which it counts again. An audit
that could not be made is a failure of its own, and says so: silence never means that nothing was found.

Exit status: 0 nothing known, 1 an advisory concerns us, 2 packages could not be looked up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND, UNREACHABLE = 1, 2
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """Why an advisory does not concern us, and until when that holds."""

    reason: str
    until: date


ACCEPTED: Mapping[str, Accepted] = {}


class AuditImpossible(Exception):
    """Packages could not be looked up."""


def advisories(lock: Path, *, osv_url: str | None = None) -> tuple[int, dict[str, list[str]]]:
    """Returns how many packages a lock pins, and the ids of the advisories about each that has any.

    Raises AuditImpossible: if the database does not answer, or a single package was not looked up.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [
            sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip",
            "--vulnerability-service", "osv", "--progress-spinner", "off", "--format", "json", "--output", report.name,
        ]  # fmt: skip
        command += ["--osv-url", osv_url] if osv_url else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        text = Path(report.name).read_text("utf-8")
    if not text:
        last_lines = "\n".join(done.stderr.splitlines()[-3:])
        raise AuditImpossible(f"{lock.name}: pip-audit ended with status {done.returncode}:\n{last_lines}")
    packages = json.loads(text)["dependencies"]
    num_pinned = sum(1 for line in lock.read_text("utf-8").splitlines() if line and not line.startswith("#"))
    skipped = [f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package]
    if skipped or len(packages) != num_pinned:
        raise AuditImpossible(
            f"{lock.name}: {len(packages) - len(skipped)} of {num_pinned} looked up\n" + "\n".join(skipped)
        )
    found = {
        f"{package['name']} {package['version']}": [advisory["id"] for advisory in package["vulns"]]
        for package in packages
        if package["vulns"]
    }
    return num_pinned, found


def concerning(found: Mapping[str, Sequence[str]], accepted: Mapping[str, Accepted], today: date) -> list[str]:
    """Returns a line for each advisory that is not accepted, or no longer."""
    lines: list[str] = []
    for package, ids in found.items():
        for advisory in ids:
            reason = accepted.get(advisory)
            if reason is None:
                lines.append(f"{package}: {advisory}, https://osv.dev/vulnerability/{advisory}")
            elif reason.until < today:
                lines.append(f"{package}: {advisory} was accepted until {reason.until}: {reason.reason}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits the locks and prints what was found; returns the exit status."""
    parser = argparse.ArgumentParser(description="Look every pinned package up in OSV's advisory database.")
    parser.add_argument("locks", nargs="*", type=Path, help="by default all of requirements/")
    parser.add_argument("--osv-url", help="another server that speaks OSV's protocol, such as a mirror")
    given = parser.parse_args(arguments)
    locks = given.locks or sorted((ROOT / "requirements").glob("*.txt"))
    status = 0
    for lock in locks:
        try:
            num_packages, found = advisories(lock, osv_url=given.osv_url)
        except AuditImpossible as error:
            print(
                f"[audit] NOT AUDITED, the advisory database could not be asked about everything\n{error}", flush=True
            )
            status = UNREACHABLE
            continue
        lines = concerning(found, ACCEPTED, datetime.now(UTC).date())
        print(f"[audit] {lock.name}: {num_packages} packages, {len(lines)} advisories", *lines, sep="\n  ", flush=True)
        status = max(status, FOUND if lines else 0)
    return status


if __name__ == "__main__":
    sys.exit(main())
