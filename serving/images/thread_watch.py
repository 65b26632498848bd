"""Checks in service whether the models run with the best number of threads; the start may have been a busy moment."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import TDMError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import ThreadCheck

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Time between two looks at whether the engine is idle."""
IDLE_S = 60.0
"""Time for which nobody asked for a picture, before a check begins."""
PAUSE_S = 3600.0
"""Time between two checks of a model."""
ROUNDS = 10
"""Rounds of a check. A request that arrives waits for the round that runs, at most a few tenths of a second."""


class ThreadWatch:
    """Checks one model after the other, each time that the engine has been idle for a while."""

    def __init__(self, engine: DiffusionEngine, checkpoints: Sequence[Checkpoint], config: BackendConfig) -> None:
        self._engine = engine
        self._checkpoints = checkpoints
        self._config = config
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thread-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            for checkpoint in self._checkpoints:
                if not self._wait_for_idle(IDLE_S):
                    return
                try:
                    if sentence := self._check(checkpoint):
                        logger.warning("%s: %s", checkpoint.recipe.name, sentence)
                except (TDMError, RuntimeError, OSError) as error:  # the server itself is well
                    logger.warning("the threads of %s could not be checked: %s", checkpoint.recipe.name, error)
            self._is_closing.wait(PAUSE_S)

    def _check(self, checkpoint: Checkpoint) -> str | None:
        check = ThreadCheck.of(checkpoint, self._config)
        if check is None:
            return None
        for _ in range(ROUNDS):
            if not self._wait_for_idle(0.0):
                return None
            self._engine.run_on_thread(check.round)
        return check.better()

    def _wait_for_idle(self, seconds: float) -> bool:
        """Wait until nobody has asked for a picture for some seconds. Returns False when the server stops."""
        stats = self._engine.stats
        seen, since_s = None, time.monotonic()
        while True:
            asked = (stats.finished, stats.failed, stats.cancelled, stats.refused)
            if asked != seen or self._engine.num_live:
                seen, since_s = asked, time.monotonic()
            if not self._engine.num_live and time.monotonic() - since_s >= seconds:
                return True
            if self._is_closing.wait(POLL_S):
                return False
