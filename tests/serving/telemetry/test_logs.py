"""Log lines in JSON and in text."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from serving.config import ServerConfig
from serving.telemetry import logs

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Path of a log file in JSON."""
    return set_up_log(tmp_path)


def set_up_log(folder: Path) -> Path:
    """Log to a file in JSON. Returns its path."""
    logs.set_up_logging(ServerConfig(log_format="json", log_file=folder / "log", log_level="info"))
    return folder / "log"


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]


def test_a_line_has_time_level_logger_and_message(tmp_path: Path) -> None:
    """The log is set up here, because pytest also captures loggers of fixtures, and xdist cannot send its \\ud800."""
    log = set_up_log(tmp_path)
    logging.getLogger("serving.x").warning("two\nlines, \ud800 and %s", '"quotes"')
    (line,) = lines(log)
    assert list(line) == ["time", "level", "logger", "message"]
    assert TIME.fullmatch(line["time"])
    assert line["level"] == "WARNING" and line["logger"] == "serving.x"
    assert line["message"] == 'two\nlines, \ud800 and "quotes"'


def test_the_lines_of_a_request_have_its_fields(log: Path) -> None:
    logs.begin_request(request_id="r", method="POST")
    logs.note(trace_id="t", code=None)
    logging.getLogger("tdm_runtime.x").info("x", extra={"status": 200, "duration_ms": 1.5, "route": "/a"})
    logs.begin_request(request_id="s")
    logging.getLogger("tdm_runtime.x").info("x")
    first, second = lines(log)
    assert {name: first[name] for name in logs.FIELDS if name in first} == {
        "request_id": "r",
        "method": "POST",
        "route": "/a",
        "status": 200,
        "duration_ms": 1.5,
        "trace_id": "t",
    }
    assert [name for name in logs.FIELDS if name in second] == ["request_id"]


def test_an_exception_is_a_field(log: Path) -> None:
    try:
        raise RuntimeError("no memory")
    except RuntimeError:
        logging.getLogger("tdm_runtime.engine.engine").exception("the engine's thread died")
    (line,) = lines(log)
    assert line["level"] == "ERROR"
    assert line["stack"].startswith("Traceback") and line["stack"].endswith("RuntimeError: no memory")


def test_a_dying_thread_is_logged_in_the_same_format(log: Path) -> None:
    def die() -> None:
        raise RuntimeError("at once")

    (thread := threading.Thread(target=die, name="short")).start()
    thread.join()
    (line,) = lines(log)
    assert line["message"] == "thread short died" and "RuntimeError: at once" in line["stack"]


def test_warnings_of_libraries_are_logged_in_the_same_format(log: Path) -> None:
    logging.getLogger("uvicorn.asgi").warning("odd")
    logging.getLogger("opentelemetry.sdk").info("not worth a line")
    assert [line["logger"] for line in lines(log)] == ["uvicorn.asgi"]


@pytest.mark.usefixtures("log")
def test_in_text_format_the_start_is_logged_as_bare_lines_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", printed := io.StringIO())
    logs.set_up_logging(ServerConfig())
    logs.start_logger.info("ready: %s", "http://a")
    assert printed.getvalue() == "ready: http://a\n"
