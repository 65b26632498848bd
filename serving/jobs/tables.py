"""Database of jobs: its tables, and the settings of SQLite."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql
from sqlalchemy import Column, Connection, Index, Table

BUSY_TIMEOUT_MS = 10_000

metadata = sql.MetaData()
jobs = Table(
    "jobs",
    metadata,
    Column("id", sql.String(64), primary_key=True),
    Column("kind", sql.String(16), nullable=False),
    Column("owner", sql.String(64), nullable=False),
    Column("model", sql.String(255), nullable=False),
    Column("status", sql.String(16), nullable=False),
    Column("num_parts", sql.Integer, nullable=False),
    Column("num_done", sql.Integer, nullable=False),
    Column("num_failed", sql.Integer, nullable=False),
    Column("request", sql.Text, nullable=False),
    Column("result", sql.Text),
    Column("error_code", sql.String(64)),
    Column("error_message", sql.Text),
    Column("created_at", sql.Double, nullable=False),
    Column("started_at", sql.Double),
    Column("completed_at", sql.Double),
    Column("expires_at", sql.Double, nullable=False),
    Column("attempt", sql.Integer, nullable=False),
    Column("lease_until", sql.Double),
    Column("worker", sql.String(64)),
    Column("idempotency_key", sql.String(255)),
    Column("body_sha256", sql.String(64)),
    sql.UniqueConstraint("owner", "kind", "idempotency_key"),
    Index("jobs_to_claim", "model", "status", "created_at"),
    Index("jobs_of_owner", "owner", "kind", "created_at", "id"),
    Index("jobs_to_expire", "expires_at"),
)
parts = Table(
    "job_parts",
    metadata,
    Column("job_id", sql.String(64), sql.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("position", sql.Integer, primary_key=True),
    Column("request", sql.Text),
    Column("content", sql.LargeBinary),
    Column("is_failed", sql.Boolean),
)


def open_database(url: str) -> sql.Engine:
    """Open a database and make missing tables.

    Raises:
        ValueError: the database cannot be used.
    """
    try:
        engine = sql.create_engine(url, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            _make_durable(engine)
        metadata.create_all(engine)
    except (sql.exc.SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]  # not the URL, which may contain a password
        raise ValueError(f"the database of jobs cannot be used ({reason}); see --database-url") from None
    return engine


def _make_durable(engine: sql.Engine) -> None:
    """Set up SQLite for a queue: commits are on the disk when they return, and writers wait for each other."""

    @sql.event.listens_for(engine, "connect")
    def set_up(connection: Any, _: object) -> None:
        connection.isolation_level = None  # `begin` below begins transactions, not the driver
        for setting in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={BUSY_TIMEOUT_MS}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the lock at once. If it read first and another wrote in between, it could only fail.
        is_reading = connection.get_execution_options().get("is_reading", False)
        connection.exec_driver_sql("BEGIN" if is_reading else "BEGIN IMMEDIATE")
