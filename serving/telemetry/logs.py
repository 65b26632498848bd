"""Log of the server: lines of text or of JSON, never with a prompt, a key or a picture."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any, cast

from serving.config import ServerConfig

OURS = ("serving", "tdm_runtime")
THEIRS = ("asyncio", "grpc", "opentelemetry", "uvicorn")
"""Libraries whose warnings are logged in the same format."""
FIELDS = ("request_id", "method", "route", "status", "duration_ms", "code", "trace_id")
"""Fields that a JSON line may have beside time, level, logger, message and stack."""
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"

start_logger = logging.getLogger("serving.start")
"""Logger for the start and the end of the command, whatever the level is. As text, its lines are bare and on stdout."""
_request: ContextVar[dict[str, Any] | None] = ContextVar("request", default=None)


def begin_request(**fields: Any) -> None:
    """Give these fields, of `FIELDS`, to all lines that this task, and tasks that it starts, will log."""
    _request.set(fields)


def note(**fields: Any) -> None:
    """Add fields to the current request. They hold in all tasks of the request."""
    if (known := _request.get()) is not None:
        known.update(fields)


class JSONLines(logging.Formatter):
    """Formats each record as one line of ASCII JSON, whatever its message contains."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        known = (_request.get() or {}) | record.__dict__
        line |= {name: known[name] for name in FIELDS if known.get(name) is not None}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class WholeLines(io.TextIOBase):
    """Text stream whose threads do not cut each other's lines.

    The stream keeps the text of each thread until its line break comes, and then writes the whole line. `print` writes
    the text and the line break one after the other, and another thread may write between them.
    """

    encoding = "utf-8"
    _writing = threading.RLock()
    """Held by one stream at a time: stdout and stderr are often one pipe, which takes a long line in several pieces."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = threading.local()

    def write(self, text: str) -> int:
        """Write what ends with a line break; keep the rest until its line break comes."""
        begun = getattr(self._thread, "begun", "") + text
        end = begun.rfind("\n") + 1
        self._thread.begun = begun[end:]
        self._send(begun[:end])
        return len(text)

    def flush(self) -> None:
        """Write what this thread began, without a line break."""
        self._send(getattr(self._thread, "begun", ""))
        self._thread.begun = ""

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def _send(self, text: str) -> None:
        rest = memoryview(text.encode(errors="backslashreplace"))
        with self._writing:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


def write_whole_lines() -> None:
    """Replace stdout and stderr of this process. Call it before `set_up_logging`, whose handlers keep the streams.

    In the process of `tdm-serve` a thread of Ray prints the replicas' lines beside the process's own.
    """
    sys.stdout, sys.stderr = (cast(IO[str], WholeLines(descriptor)) for descriptor in (1, 2))


def set_up_logging(config: ServerConfig) -> None:
    """Set up the log of this process. A second call replaces the first.

    Raises:
        OSError: the log file cannot be written.
    """
    handler = _handler(config)
    for name in (*OURS, *THEIRS):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(config.log_level.upper() if name in OURS else logging.WARNING)
        logger.propagate = False
    start_logger.setLevel(logging.INFO)
    start_logger.propagate = config.log_format == "json"
    start_logger.handlers = [] if config.log_format == "json" else [logging.StreamHandler(sys.stdout)]
    threading.excepthook = _log_dead_thread


def _handler(config: ServerConfig) -> logging.Handler:
    handler: logging.Handler = logging.StreamHandler()
    if config.log_file is not None:
        from logging.handlers import WatchedFileHandler  # reopens the file after logrotate moved it

        handler = WatchedFileHandler(config.log_file, encoding="utf-8")
    handler.setFormatter(JSONLines() if config.log_format == "json" else logging.Formatter(TEXT_FORMAT))
    return handler


def _log_dead_thread(died: threading.ExceptHookArgs) -> None:
    if died.exc_value is not None:
        name = "unknown" if died.thread is None else died.thread.name
        logging.getLogger(__name__).error("thread %s died", name, exc_info=died.exc_value)
