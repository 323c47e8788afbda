"""What was measured when, kept for good: a database by its SQLAlchemy URL, SQLite by default, PostgreSQL for a team.

A record is one measurement with all its raw samples. The records of one sitting are written in one transaction: another
writer waits for it, and one that is killed leaves none of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd import plugins
from edgekd.errors import MissingToolchainError, StorageError, UsageError, first_line
from edgekd.measurement import Measurement
from edgekd.protocols import Progress
from edgekd.store import state_folder

from .stats import latency_ms

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

__all__ = ["Entry", "History", "history_url", "is_available", "keep"]

WAIT_S = 60  # for another writer
LOCK = 0x65646765  # PostgreSQL's advisory locks go by number: 'edge'


@dataclass(frozen=True)
class Entry:
    """One measurement of one file.

    Attributes:
        created: When it was written down, UTC.
        release: As whoever measured it called it; may be empty.
        model: Name on the card.
        device: Name, and what stands behind it.
        how: ``bench``, ``compare`` or ``import``.
        measurement: With its raw samples.
    """

    created: datetime
    release: str
    model: str
    device: str
    how: str
    measurement: Measurement

    @property
    def label(self) -> str:
        """The release, else the first digits of the file's hash."""
        return self.release or self.measurement.artifact_sha256[:7]

    @property
    def latency_ms(self) -> float | None:
        return latency_ms(self.measurement)


def history_url() -> str:
    """``EDGEKD_HISTORY``, by default a SQLite file beside edgekd's other state."""
    return os.environ.get("EDGEKD_HISTORY") or f"sqlite:///{state_folder() / 'history.db'}"


def is_available() -> bool:
    """Whether the extra is installed."""
    return not plugins.missing(("sqlalchemy",))


class History:
    """A store of measurements; made where it is not there yet.

    Raises:
        MissingToolchainError: The extra is not installed.
        UsageError: The URL is none.
        StorageError: The database cannot be reached, here and in every method.
    """

    def __init__(self, url: str | None = None) -> None:
        if not is_available():
            raise MissingToolchainError("the history", "sqlalchemy", "history")
        import sqlalchemy as sql

        self._url = url or history_url()
        try:
            parsed = sql.make_url(self._url)
            options: dict[str, Any] = {}
            if parsed.get_backend_name() == "sqlite":
                options["connect_args"] = {"timeout": WAIT_S}
                if parsed.database and parsed.database != ":memory:":
                    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine: Engine = sql.create_engine(parsed, **options)
        except (sql.exc.ArgumentError, sql.exc.NoSuchModuleError, ModuleNotFoundError) as error:
            works = "sqlite:///history.db or postgresql+psycopg://user@host/name works"
            raise UsageError(f"{self._url.partition('@')[0]}…: {first_line(error)}; {works}") from None
        except OSError as error:
            raise StorageError(f"{self._url}: {error.strerror}") from error
        self._table = _table()
        # pysqlite would begin late, and two writers could then both read before either writes.
        if parsed.get_backend_name() == "sqlite":
            sql.event.listen(self._engine, "connect", _no_implicit_begin)
            sql.event.listen(self._engine, "begin", _begin_immediate)

    def add(self, measurements: Sequence[tuple[str, Measurement]], release: str = "", how: str = "bench") -> int:
        """Write down what one sitting measured: all of it or nothing.

        Args:
            measurements: Each with the name of its model. What was not run is not kept.

        Returns:
            How many records were written.
        """
        now = datetime.now(UTC).isoformat()
        rows = [
            {
                "created": now,
                "release": release,
                "model": model,
                "target": m.target,
                "precision": m.precision,
                "device": m.device,
                "how": how,
                "content": json.dumps(m.to_json(), allow_nan=False),
            }
            for model, m in measurements
            if m.status == "measured"
        ]
        with self._writing() as connection:
            if rows:
                connection.execute(self._table.insert(), rows)
        return len(rows)

    def entries(self, model: str = "", device: str = "") -> list[Entry]:
        """All records, oldest first; of one model, and of devices whose name begins so, where asked."""
        import sqlalchemy as sql

        columns = self._table.c
        query = sql.select(self._table).order_by(columns.created, columns.id)
        if model:
            query = query.where(columns.model == model)
        if device:
            query = query.where(columns.device.startswith(device, autoescape=True))
        with self._writing() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            Entry(
                datetime.fromisoformat(row["created"]),
                row["release"],
                row["model"],
                row["device"],
                row["how"],
                Measurement.from_json(json.loads(row["content"])),
            )
            for row in rows
        ]

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """One transaction, in which the table is there."""
        import sqlalchemy as sql
        from sqlalchemy.schema import CreateTable

        try:
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":  # IF NOT EXISTS alone fails when two create at once
                    connection.execute(sql.text(f"SELECT pg_advisory_xact_lock({LOCK})"))
                connection.execute(CreateTable(self._table, if_not_exists=True))
                yield connection
        except sql.exc.DBAPIError as error:
            where = self._engine.url.render_as_string(hide_password=True)
            raise StorageError(f"history at {where}: {first_line(error.orig or error)}") from error


def keep(measured: Sequence[tuple[str, Measurement]], release: str, how: str, progress: Progress) -> None:
    """Write down what was measured, in the default store; where that fails, say so: it is measured all the same.

    That goes for a URL that is none, too: it is found out when the minutes are spent.
    """
    if not is_available():
        progress.say("not kept in the history: pip install 'edgekd[history]'")
        return
    try:
        store = History()
        try:
            store.add(measured, release, how)
        finally:
            store.close()
    except (StorageError, UsageError) as error:
        progress.say(f"not kept in the history: {error}")


def _table() -> Table:
    """The only table; its number rises when its columns change."""
    import sqlalchemy as sql

    return sql.Table(
        "edgekd_measurements_1",
        sql.MetaData(),
        sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
        *(
            sql.Column(name, sql.String, nullable=False)
            for name in ("created", "release", "model", "target", "precision", "device", "how")
        ),
        sql.Column("content", sql.Text, nullable=False),
    )


def _no_implicit_begin(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
