"""A real PostgreSQL server of a test's own: on this machine, or on a host of `tests.cluster.hosts`."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import Host, HostProcess
from tests.waiting import free_port

_START_SECONDS = 120.0
_UNPRIVILEGED = "nobody"


def programs_folder() -> Path | None:
    """Returns the folder with `postgres` and `initdb`, or None: Debian keeps them out of the PATH."""
    found = shutil.which("postgres")
    candidates = [Path(found).resolve().parent] if found else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


def why_unavailable() -> str | None:
    """Returns why no PostgreSQL can be started here, or None if one can."""
    return None if programs_folder() else "missing: postgres and initdb (Debian's package postgresql)"


class Postgres:
    """A database server whose files lie in a folder that all users may pass through.

    host: where it runs; None for this machine. It listens on the loopback address there, without a password.
    """

    def __init__(self, folder: Path, host: Host | None = None, port: int = 5432) -> None:
        found = programs_folder()
        assert found is not None, why_unavailable()
        self._programs, self._folder, self._host, self.port = found, folder, host, port
        # PostgreSQL refuses to run as root.
        self._user = pwd.getpwnam(_UNPRIVILEGED).pw_uid if os.geteuid() == 0 else None
        self._process: HostProcess | subprocess.Popen[bytes] | None = None
        self.log = folder / "postgres.log"

    @property
    def url(self) -> str:
        """The database `prefect`, as Prefect's server wants it."""
        return f"postgresql+asyncpg://bimode@127.0.0.1:{self.port}/prefect"

    def create(self) -> None:
        """Makes the files of a server with an empty database `prefect`."""
        data = self._folder / "data"
        data.mkdir(parents=True)
        if self._user is not None:
            os.chown(data, self._user, -1)
        initdb = [str(self._programs / "initdb"), "--pgdata", str(data), "--username=bimode", "--auth=trust"]
        self._run([*initdb, "--encoding=UTF8", "--locale=C", "--no-sync"])
        single = [str(self._programs / "postgres"), "--single", "-D", str(data), "postgres"]
        self._run(single, "CREATE DATABASE prefect;\n")

    def start(self) -> None:
        """Starts the server, after a crash too, and waits until it takes connections."""
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "shared_buffers=64MB"]
        if self._host is not None:
            self._process = self._host.start(command, log=self.log, user=self._user)
        else:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, user=self._user
                )
        self._await_ready()

    def kill(self) -> None:
        """Kills the server; it recovers from its log when it is started again."""
        assert self._process is not None
        self._process.kill()
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()

    def stop(self) -> None:
        if isinstance(self._process, subprocess.Popen):
            self._process.terminate()
            self._process.wait()
        elif self._process is not None:
            self._process.stop()

    def query(self, statement: str) -> str:
        """Returns what a statement says in the database `prefect`, unaligned and without a header."""
        psql = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "bimode", "-d", "prefect", "-tAc", statement]
        return self._run(psql).strip()

    def size_bytes(self) -> int:
        return int(self.query("SELECT pg_database_size('prefect')"))

    def _await_ready(self) -> None:
        ask = ["pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        command = ask if self._host is None else self._host.enter(ask)
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run(command, check=False).returncode != 0:
            assert time.monotonic() < deadline, f"PostgreSQL does not start:\n{self.log.read_text(encoding='utf-8')}"
            time.sleep(0.1)

    def _run(self, command: list[str], given: str | None = None) -> str:
        entered = command if self._host is None else self._host.enter(command, user=self._user)
        user = None if self._host is not None else self._user
        done = subprocess.run(
            entered, input=given or "", capture_output=True, text=True, check=False, user=user, cwd=self._folder
        )
        assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def open_folder() -> Iterator[Path]:
    """Yields a new folder that every user may pass through, which pytest's own may not be, and removes it."""
    with tempfile.TemporaryDirectory(prefix="bimode-postgres-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Yields a PostgreSQL server on this machine, with an empty database `prefect`."""
    with open_folder() as folder:
        server = Postgres(folder, port=free_port())
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()
