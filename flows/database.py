"""Where Prefect's server keeps its state: SQLite beside it, or PostgreSQL by one setting.

    bimode up --database postgresql://bimode@db.example/prefect
    BIMODE_DATABASE=postgresql://bimode:PASSWORD@db.example/prefect bimode up

The address may hold a password, so it goes to the server's process alone, by its environment: no worker, flow run,
log, record or message gets it. A password may also come from PGPASSWORD or ~/.pgpass, which asyncpg reads.

Prefect's data is no part of a corpus. Whoever loses the database loses schedules, history and automations; stored
replies, shards and versions lie in work folders, and the next run goes on from them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import ConfigError

VARIABLE = "BIMODE_DATABASE"
SECRET_VARIABLES = (VARIABLE, "PGPASSWORD", "PGPASSFILE")
"""What no process but the server's inherits."""
SERVER_VARIABLE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
SQLITE = "SQLite"
_OLDEST_POSTGRES = 140_000  # PostgreSQL 14, the oldest that Prefect supports
_CONNECT_SECONDS = 10.0
_EXTENSION = "pg_trgm"


@dataclass(frozen=True, slots=True)
class Database:
    """A database of Prefect's server. shown: the same without a password, for messages and records."""

    url: str = field(repr=False)
    shown: str

    @property
    def is_postgres(self) -> bool:
        return bool(self.url)

    def server_environment(self) -> dict[str, str]:
        """Returns what the server's process gets, and no other. SQLite needs nothing: it lies in Prefect's home."""
        if not self.is_postgres:
            return {}
        inherited = {name: os.environ[name] for name in SECRET_VARIABLES if name in os.environ and name != VARIABLE}
        return {SERVER_VARIABLE: self.url, **inherited}


def chosen_database(given: str | None, environment: Mapping[str, str] = os.environ) -> Database:
    """Returns the database that an option names, else the environment, else SQLite. Raises ConfigError."""
    text = given or environment.get(VARIABLE) or ""
    return parse_database(text) if text else Database("", SQLITE)


def parse_database(text: str) -> Database:
    """Returns the PostgreSQL database of an address, `postgresql://...` or `postgresql+asyncpg://...`.

    Raises ConfigError: it is none. The message holds no part of the address that could be a secret.
    """
    from sqlalchemy.engine import URL, make_url  # noqa: PLC0415 - most commands do without a database
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"the address of the database ({VARIABLE} or --database) cannot be read; it looks like "
            "postgresql://USER@HOST:5432/NAME"
        ) from None  # the cause quotes the address
    if url.drivername not in {"postgresql", "postgres", "postgresql+asyncpg"}:
        raise ConfigError(
            f"a database of the kind {url.drivername!r} is not supported: give postgresql://USER@HOST:5432/NAME, or "
            "nothing for SQLite"
        )
    if not url.host or not url.database:
        raise ConfigError("the address of the database lacks its host or its name: postgresql://USER@HOST:5432/NAME")
    url = url.set(drivername="postgresql+asyncpg")
    shown = URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    return Database(url.render_as_string(hide_password=False), shown.render_as_string())


def check_database(database: Database) -> None:
    """Connects once and looks whether Prefect can use it. Raises ConfigError: with what to do."""
    if database.is_postgres:
        asyncio.run(_check_postgres(database))


async def _check_postgres(database: Database) -> None:
    import asyncpg  # type: ignore[import-untyped]  # noqa: PLC0415
    from sqlalchemy.engine import make_url  # noqa: PLC0415

    address = make_url(database.url).set(drivername="postgresql").render_as_string(hide_password=False)
    try:
        connection = await asyncpg.connect(address, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        # What asyncpg says names user and database, never the password.
        raise ConfigError(f"the database {database.shown} cannot be used: {_reason(error)}") from None
    try:
        if connection.get_server_version().major * 10_000 < _OLDEST_POSTGRES:
            version = connection.get_server_version().major
            raise ConfigError(f"{database.shown} is PostgreSQL {version}; Prefect needs 14 or newer")
        installed = "SELECT count(*) FROM pg_extension WHERE extname = $1"
        available = "SELECT count(*) FROM pg_available_extensions WHERE name = $1"
        if not await connection.fetchval(installed, _EXTENSION):
            if not await connection.fetchval(available, _EXTENSION):
                raise ConfigError(f"{database.shown} lacks the extension {_EXTENSION}: install PostgreSQL's contrib")
            if not await connection.fetchval("SELECT has_database_privilege(current_database(), 'CREATE')"):
                raise ConfigError(
                    f"the user of {database.shown} may not create the extension {_EXTENSION}: have an administrator "
                    f"run CREATE EXTENSION {_EXTENSION} there once"
                )
    finally:
        await connection.close()


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"it did not answer within {_CONNECT_SECONDS:.0f} s"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def sqlite_bytes(prefect_home: Path) -> int:
    """Returns the size of an SQLite database of Prefect's, with the log of what was not merged yet."""
    files = (prefect_home / f"prefect.db{suffix}" for suffix in ("", "-wal"))
    return sum(path.stat().st_size for path in files if path.exists())
