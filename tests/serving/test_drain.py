"""SIGTERM under load: what was accepted is answered, what comes later is told to go elsewhere."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import httpx
import pytest

from serving.config import FrontName
from tests.serving.conftest import RunningServer, start_server

SEEN_LIVE = 20
"""Of 60 pictures asked for at once: enough to know that work is in flight."""


def live_samples(server: RunningServer) -> float:
    found = re.search(r"^tdm_live_samples (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("front", get_args(FrontName))
def test_accepted_requests_are_answered_before_the_server_exits(tmp_path: Path, front: FrontName) -> None:
    server = start_server(tmp_path / "log", "--front", front)
    answer = httpx.get(f"{server.url}/health", headers={"x-request-id": "abc-123"})
    assert answer.headers.get_list("x-request-id") == ["abc-123"]
    body = {"prompt": "a cat", "n": 10, "num_inference_steps": 4}

    def ask(_: int) -> int:
        return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60).status_code

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, n) for n in range(6)]
        while live_samples(server) < SEEN_LIVE:
            assert not all(future.done() for future in asked), "the load was gone before it was seen"
            time.sleep(0.01)
        assert server.stop() == 0, server.log.read_text()[-2000:]
        assert [future.result() for future in asked] == [200] * 6
