"""Numbers of a refused latency budget, read from the error message."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = r"(\d+\.\d)"


@dataclass(frozen=True)
class Refusal:
    """A refusal, with its printed numbers in milliseconds."""

    message: str

    def number(self, pattern: str) -> float:
        """Return the number at `#` in the part of the message that matches `pattern`."""
        found = re.search(pattern.replace("#", NUMBER), self.message)
        assert found is not None, f"no {pattern!r} in {self.message!r}"
        return float(found[1])

    @property
    def left_ms(self) -> float:
        """Part of the budget that is left to the engine."""
        return self.number("latency_budget_ms leaves # ms")

    @property
    def taken_ms(self) -> float:
        """Part of the budget that is not left to the engine."""
        return (
            self.number(": # ms have passed") + self.number("hand-over takes # ms") + self.number("and encoding # ms")
        )

    @property
    def unloaded_ms(self) -> float:
        """Time that the pictures take on an idle engine."""
        return self.number("an idle engine needs # ms for")

    @property
    def workable_ms(self) -> float:
        """Smallest budget that works."""
        return self.number("raise the budget to at least # ms or")

    def adds_up(self) -> bool:
        """Whether the numbers of a 429 show that the promise would be broken."""
        spare_ms = self.number("# ms are reserved for slow calls")
        if "a picture accepted earlier would be late" in self.message:
            return self.number("would be done in # ms") + spare_ms > self.number("it is due in # ms")
        return self.unloaded_ms + self.number("# ms of work come first") + spare_ms > self.left_ms
