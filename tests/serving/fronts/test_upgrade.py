"""Requests that offer another protocol (`Upgrade`) on the replica's front; `test_cluster.py` has Ray's proxy."""

from __future__ import annotations

import pytest

from tests.serving.conftest import RunningServer
from tests.serving.fronts.raw_http import Conversation, conversations


@pytest.mark.parametrize("conversation", conversations(), ids=lambda conversation: conversation.name)
def test_a_request_that_offers_an_upgrade_is_answered_once(server: RunningServer, conversation: Conversation) -> None:
    assert conversation.hold(server.port) == conversation.expected
