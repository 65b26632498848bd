"""Engines on two Ray nodes, one of which is killed under load: every accepted request is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.command.arguments import parse_arguments
from tests.ports import free_port
from tests.serving.images import cluster


@pytest.fixture(scope="module")
def said(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the clients of one cluster saw."""
    given = (str(tiny_checkpoint), str(free_port()), str(tmp_path_factory.mktemp("cluster") / "spans.jsonl"))
    command = [sys.executable, "-m", "tests.serving.images.cluster", *given]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    sys.stderr.write(ended.stderr[-3000:])
    seen: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return seen


def test_killing_a_node_loses_no_request(said: dict[str, Any]) -> None:
    assert set(said["statuses"]) == {"200"}
    assert said["statuses"]["200"] >= cluster.NUM_CLIENTS * (cluster.ANSWERS_BEFORE + cluster.ANSWERS_AFTER)
    assert 1 <= said["retried"] <= cluster.NUM_CLIENTS  # each request at the dead node, once


def test_the_ingress_counts_and_traces_what_the_engines_made(said: dict[str, Any]) -> None:
    num_answered = said["statuses"]["200"]
    assert said["budgets_promised"] == said["budgets_kept"] == num_answered
    assert {"queue", "text", "denoise", "decode", "encode"} < set(said["spans"])


def test_rays_proxy_answers_a_request_that_offers_an_upgrade_once(said: dict[str, Any]) -> None:
    """The conversations of `test_upgrade.py`."""
    assert said["wrong"] == {}


@pytest.mark.parametrize(("text", "expected"), [("3", (3, 3)), ("1-4", (1, 4))])
def test_the_command_line_sets_the_number_of_replicas(text: str, expected: tuple[int, int]) -> None:
    config = parse_arguments(["--front", "ray", "--replicas", text])
    assert (config.min_replicas, config.max_replicas) == expected


@pytest.mark.parametrize(
    "arguments", [["--replicas", "0"], ["--replicas", "4-1"], ["--replicas", "1-4"], ["--replicas", "x"]]
)
def test_the_command_line_refuses_a_wrong_number_of_replicas(arguments: list[str]) -> None:
    """A range of replicas needs Ray's proxy, which measures the load."""
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
