"""How a database gets its tables and functions, and what it must be like."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from message_model import RepositoryUnavailableError

from .connections import Database
from .functions import FUNCTIONS
from .tables import TABLES
from .telling import TELLING

if TYPE_CHECKING:
    import psycopg

__all__ = ["MIGRATIONS", "check_database", "prepare"]

START_TIMEOUT = 30.0  # seconds for the first connection's work; another process may be creating the tables

MIGRATION_LOCK = 0x534D5350  # "SMSP": the advisory lock of a transaction that creates or migrates

# Each script leads from the schema version that is its index to the next one.
MIGRATIONS = (TABLES + FUNCTIONS + TELLING,)


def prepare(database: Database) -> None:
    """Creates what is missing; raises `RepositoryUnavailableError` when the database cannot be used."""
    with database.start(START_TIMEOUT) as db:
        _check_settings(db)
        _migrate(db)
        # Looks begin anew, also in a database that was restored and knows transactions of another server.
        db.execute(
            "UPDATE smsproxy.pulse SET front = DEFAULT, next_front = DEFAULT, published = DEFAULT, settled = NULL"
        )


def check_database(url: str) -> None:
    """Raises `RepositoryUnavailableError` when a start would fail. Only looks: it creates and changes nothing."""
    database = Database(url, 1)
    try:
        with database.start(START_TIMEOUT) as db:
            _check_settings(db)
            may_create = "SELECT has_database_privilege(current_database(), 'CREATE')"
            if _version(db) < len(MIGRATIONS) and not _value(db, may_create):
                raise RepositoryUnavailableError("the tables are missing or old, and this role may not create any")
    finally:
        database.close()


def _migrate(db: psycopg.Connection[Any]) -> None:
    """Creates what is missing, one process at a time; raises `RepositoryUnavailableError` when the schema is newer."""
    if _version(db) == len(MIGRATIONS):
        return
    with db.transaction():  # all or nothing, and the lock ends with it
        db.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        version = _version(db)  # another process may have been faster
        if version == 0:
            db.execute("CREATE SCHEMA IF NOT EXISTS smsproxy")
            db.execute("CREATE TABLE smsproxy.version (version int NOT NULL)")
            db.execute("INSERT INTO smsproxy.version VALUES (0)")
        for script in MIGRATIONS[version:]:
            db.execute(script)  # without parameters, so that one call may have many statements
        db.execute("UPDATE smsproxy.version SET version = %s", (len(MIGRATIONS),))


def _version(db: psycopg.Connection[Any]) -> int:
    # Read from the catalog: `to_regclass` may remember from before the lock that there was no such table.
    tables = "SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'smsproxy' AND tablename = 'version'"
    if not _value(db, tables):
        return 0
    version = int(_value(db, "SELECT version FROM smsproxy.version"))
    if version > len(MIGRATIONS):
        raise RepositoryUnavailableError(
            f"the schema has version {version}, newer than this program's {len(MIGRATIONS)}"
        )
    return version


# Settings that would break a promise, the values that do, and the promise.
REFUSED = {
    "synchronous_commit": (("off",), "a message that was accepted could be lost"),
    "fsync": (("off",), "a message that was accepted could be lost"),
    "default_transaction_isolation": (("repeatable read",), "a message could be claimed twice"),
    "transaction_read_only": (("on",), "this server is a standby, or set to read only"),
}


def _check_settings(db: psycopg.Connection[Any]) -> None:
    """Raises `RepositoryUnavailableError` when the server cannot keep what the service promises."""
    for name, (values, promise) in REFUSED.items():
        value = _value(db, "SELECT current_setting(%s)", name)
        if value in values:
            raise RepositoryUnavailableError(f"{name} is {value}: {promise}")
    encoding = _value(db, "SELECT current_setting('server_encoding')")
    if encoding != "UTF8":
        raise RepositoryUnavailableError(f"the database's encoding is {encoding}, not UTF8")


def _value(db: psycopg.Connection[Any], sql: str, *parameters: Any) -> Any:
    row = db.execute(sql, parameters or None).fetchone()
    return row[0] if row else None
