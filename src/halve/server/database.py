"""A database, SQLite or PostgreSQL: its transactions, and its tables brought up to today's.

Every method is one transaction and blocks; the server calls it from threads.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from halve.core.errors import ConfigError, OutputError
from halve.server.tables import HEAD

DATABASE_ERRORS = (sa.exc.SQLAlchemyError, OSError)


class Database:
    """url: `sqlite:///path` or `postgresql://...`. Makes or upgrades the tables. Raises OutputError, ConfigError."""

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._readers = self.engine.execution_options(reads=True)
        try:
            self._upgrade()
        except sa.exc.SQLAlchemyError as error:
            reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
            raise OutputError(f"database {self.engine.url!r}: {reason}; name another with --db") from error

    def _upgrade(self) -> None:
        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("select pg_advisory_xact_lock(7266148)"))
            # Alembic takes a third of a second to load, which a start with tables of today does not need.
            has = sa.inspect(connection).has_table("alembic_version")
            if has and connection.scalar(sa.text("select version_num from alembic_version")) == HEAD:
                return
            _alembic("upgrade", "head", connection)

    def downgrade(self) -> None:
        """Drop all tables (for tests of the migrations)."""
        with self.writing() as connection:
            _alembic("downgrade", "base", connection)

    def writing(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that may write."""
        return self.engine.begin()

    def reading(self) -> AbstractContextManager[sa.Connection]:
        """One that only reads, and waits for nobody who writes."""
        return self._readers.begin()

    def close(self) -> None:
        """Let its connections go."""
        self.engine.dispose()

    def rows(self, query: Any) -> Sequence[Any]:
        """The rows of a query."""
        with self.reading() as c:
            return c.execute(query).all()

    def change(self, statement: Any) -> int:
        """Run one statement; the number of rows that it changed."""
        with self.writing() as c:
            return int(c.execute(statement).rowcount)


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError(f"db: {url!r:.80} is no database; give sqlite:///PATH or postgresql://...") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"db: {parsed.get_backend_name()} is not known; give sqlite:///PATH or postgresql://...")
    if parsed.get_backend_name() == "postgresql":
        try:
            return sa.create_engine(parsed, pool_pre_ping=True, pool_size=10)
        except ImportError as error:
            raise ConfigError("db: PostgreSQL needs psycopg; pip install 'psycopg[binary]'") from error
    if parsed.database and parsed.database != ":memory:":
        try:
            Path(parsed.database).absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"database {parsed.database}: {error.strerror}; name another with --db") from error
    # A transaction of SQLite that may write begins as a writer: two that read first would wait for each other.
    engine = sa.create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        for pragma in ("busy_timeout=30000", "synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        for attempt in range(100):  # no time-out covers this change of a new database
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:
                if attempt == 99:
                    raise
                time.sleep(0.05)

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("reads") else "BEGIN IMMEDIATE")

    return engine


def _alembic(command: str, to: str, connection: sa.Connection) -> None:
    from alembic import command as commands
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    getattr(commands, command)(config, to)


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT."""
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def upsert(
    connection: sa.Connection, table: sa.Table, row: Mapping[str, Any], index: list[str], changed: Mapping[str, Any]
) -> Any:
    """An INSERT that changes the row that is there already, by the columns of `index`."""
    return insert(connection, table).values(**row).on_conflict_do_update(index_elements=index, set_=dict(changed))
