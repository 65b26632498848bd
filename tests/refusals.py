"""What a refused latency budget says, read back from its message."""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBER = r"(\d+\.\d)"


@dataclass(frozen=True)
class Refusal:
    """The numbers of a refusal, in milliseconds as they are printed."""

    message: str

    def number(self, pattern: str) -> float:
        """The number where `#` stands in a part of the message."""
        found = re.search(pattern.replace("#", NUMBER), self.message)
        assert found is not None, f"no {pattern!r} in {self.message!r}"
        return float(found[1])

    @property
    def left_ms(self) -> float:
        return self.number("latency_budget_ms leaves # ms")

    @property
    def taken_ms(self) -> float:
        """Taken from the budget before the engine's share."""
        return self.number(": # ms had passed") + self.number("over takes # ms") + self.number("and encoding # ms")

    @property
    def unloaded_ms(self) -> float:
        return self.number("would take # ms with nothing else to do")

    @property
    def workable_ms(self) -> float:
        return self.number("allow for at least # ms or")

    def adds_up(self) -> bool:
        """Whether the numbers of a 429 prove that the promise could not be given."""
        spare_ms = self.number("# ms are kept for slow calls")
        if "a picture promised before would be late" in self.message:
            return self.number("would be done in # ms") + spare_ms > self.number("it is due in # ms")
        return self.unloaded_ms + self.number("# ms of work come before") + spare_ms > self.left_ms
